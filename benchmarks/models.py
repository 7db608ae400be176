"""Every network of the zoo: planned, converted, run, trained a step, saved, loaded and exported.

    python benchmarks/models.py --json benchmarks/results/models.json --markdown docs/models.md

Weights are random (seed 0), calibration images are smooth noise, and planning runs on small images,
so that all of it takes minutes. Checked: each network passes all steps, and what is saved and
exported computes what was evaluated. Multiply-adds are counted at the network's own
size. --models NAME … does a part and leaves the other rows of the JSON file as they are.
"""

import argparse
import copy
import datetime
import gc
import json
import logging
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from timing import machine
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from sbf_dist.compression.cost import count
from sbf_dist.compression.named_outputs import named_tensors
from sbf_dist.compression.one_shot import compress
from sbf_dist.compression.plan import DenseLayer, Plan, SBFLayer
from sbf_dist.export.onnx import export_onnx, verify_onnx
from sbf_dist.export.optimize import optimize
from sbf_dist.export.saved import Card, load_student, save_student
from sbf_dist.models import Architecture
from sbf_dist.settings import Compression

SHARE = 0.5  # of the multiply-adds
TOLERANCE = 1e-3  # of the largest output: between engines, in float32
EXACT = 1e-9  # the same, in double: what is left of a difference that is rounding


@dataclass(frozen=True)
class Network:
    """How a network is run through the steps.

    size: of its own images; planned: of the images that it is planned on; transform_size: m, at
    most, 1 where layers are wide, whose fits take minutes with more; macs: the budget, more where
    other operators than convolutions, which stay as they are, do most of the work; model,
    arguments: what it is built of, where the row has another name.
    """

    size: int = 224
    planned: int = 64
    classes: int | None = 1000
    transform_size: int = 1
    macs: float = SHARE
    model: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def architecture(self, name: str) -> Architecture:
        """Return what the network of a row is built of."""
        return Architecture.of(self.model or name, self.classes, self.arguments)

    @property
    def channels(self) -> int:
        """Channels of its images."""
        return self.arguments.get("in_chans", self.arguments.get("channels", 3))


OWN = Path(__file__).with_name("own_networks.py")
SEGMENTATION = Network(classes=21)
DETECTION = Network(classes=None, model=f"{OWN}:backbone_of")
CIFAR = Network(size=32, planned=32, classes=10, transform_size=3)
NETWORKS = {
    **dict.fromkeys(
        ["cifar_resnet20", "cifar_resnet56", "cifar_resnet110", "cifar_vgg11_w16"], CIFAR
    ),
    "cifar_vgg16": replace(CIFAR, transform_size=1),
    # Its linear layers, which an image's size does not change, must not outweigh the rest.
    "torchvision:alexnet": Network(planned=128, macs=0.75),
    "torchvision:convnext_tiny": Network(macs=0.98),
    **dict.fromkeys(
        [
            "torchvision:densenet121",
            "torchvision:efficientnet_b0",
            "torchvision:efficientnet_v2_s",
            "torchvision:googlenet",
            "torchvision:mnasnet1_0",
            "torchvision:mobilenet_v2",
            "torchvision:mobilenet_v3_large",
            "torchvision:regnet_y_800mf",
            "torchvision:resnet18",
            "torchvision:resnet50",
            "torchvision:resnet101",
            "torchvision:resnext50_32x4d",
            "torchvision:shufflenet_v2_x1_0",
            "torchvision:squeezenet1_0",
            "torchvision:vgg16_bn",
            "torchvision:wide_resnet50_2",
            "timm:darknet53",
            "timm:dla34",
            "timm:ghostnet_100",
            "timm:hrnet_w18_small",
            "timm:mobileone_s0",
            "timm:repvgg_a0",
            "timm:res2net50_26w_4s",
            "timm:resnet26t",
            "timm:resnet50d",
            "timm:seresnet50",
        ],
        Network(),
    ),
    "torchvision:inception_v3": Network(size=299, planned=96),
    "torchvision:maxvit_t": Network(planned=224, macs=0.9),  # its windows want that size
    **dict.fromkeys(
        [
            "torchvision:deeplabv3_mobilenet_v3_large",
            "torchvision:fcn_resnet50",
            "torchvision:lraspp_mobilenet_v3_large",
        ],
        SEGMENTATION,
    ),
    **{
        f"backbone of torchvision's {name}": replace(DETECTION, arguments={"detector": name})
        for name in ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn")
    },
    "timm:resnet18, features_only": Network(
        classes=None, model="timm:resnet18", arguments={"features_only": True, "num_classes": 0}
    ),
    "timm:resnet18, embedding": Network(classes=0, model="timm:resnet18"),
    "timm:resnet18, in_chans=1": Network(model="timm:resnet18", arguments={"in_chans": 1}),
    "UNet": Network(classes=4, model=f"{OWN}:UNet", arguments={"channels": 1}),
    "YOLO-like network": Network(classes=80, model=f"{OWN}:Yolo"),
}


def pictures(number: int, size: int, channels: int = 3) -> Tensor:
    """Smooth noise: neighbours are alike, as in photographs."""
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(number, channels, size, size, generator=generator)
    return raw + 2 * F.avg_pool2d(raw, 5, 1, 2)


@torch.no_grad()
def settle(model: nn.Module, images: Tensor) -> nn.Module:
    """Let the batch norms know `images`, so that signals keep their scale; in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def check(name: str, network: Network, images: int) -> dict:
    """Run a network through all steps; RuntimeError where two forms differ in their outputs."""
    start = time.process_time()
    torch.manual_seed(0)
    batch = pictures(images, network.planned, network.channels)
    model = settle(network.architecture(name).build(), batch)
    student, plan = planned_within(network.macs, name, network, model, batch)
    planned = time.process_time() - start
    take_a_step(name, student, batch)
    pair = batch[:2]
    with torch.inference_mode():
        expected = named_tensors(student(pair))
    with tempfile.TemporaryDirectory() as folder:
        card = Card.of(plan, mean=[0.0] * network.channels, std=[1.0] * network.channels)
        save_student(Path(folder) / "student", student, plan, card)
        scale = max(tensor.abs().max().item() for tensor in expected.values())
        own = plan.model if network.model.startswith(str(OWN)) else None
        loaded = load_student(Path(folder) / "student", build=own)
        with torch.inference_mode():
            precise = copy.deepcopy(student).double()
            exact = named_tensors(precise(pair.double()))
            last = pair.contiguous(memory_format=torch.channels_last)
            differences = {
                "loaded": difference(loaded(pair), expected),
                "optimized": difference(optimize(student)(last), expected),
                "optimized, double": difference(optimize(precise)(pair.double()), exact),
                "rounding": difference(expected, exact),  # of the student itself
            }
        path = Path(folder) / "student.onnx"
        export_onnx(student, path, card)
        differences["onnx"] = verify_onnx(path, student, pair)
    relative = {form: float(value) / scale for form, value in differences.items()}
    # Weights that were fitted to noise may be badly conditioned: then the student's own rounding
    # says what float32 can give.
    rounded = max(TOLERANCE, 3 * relative["rounding"])
    allowed = {"loaded": 0.0, "optimized": rounded, "optimized, double": EXACT, "onnx": rounded}
    for form, most in allowed.items():
        if not relative[form] <= most:
            raise RuntimeError(
                f"{name}, {form}: outputs differ by {relative[form]:.1e} of the largest"
            )
    shape = (network.channels, network.size, network.size)
    before, after = count(model, shape), count(student, shape)
    return {
        "size": network.size,
        "planned_size": network.planned,
        "asked": network.macs,
        "macs_before": before.macs,
        "macs_after": after.macs,
        "planned_macs_before": plan.macs_before,
        "planned_macs_after": plan.macs_after,
        "params_before": before.params,
        "params_after": after.params,
        "convolutions": len(plan.layers),
        "converted": sum(isinstance(layer, SBFLayer) for layer in plan.layers.values()),
        "dense": left_dense(plan),
        "difference": {form: float(f"{value:.1e}") for form, value in relative.items()},
        "cpu_seconds": {
            "plan": round(planned, 1),
            "rest": round(time.process_time() - start - planned, 1),
        },
    }


def difference(outputs: Any, wanted: Mapping[str, Tensor]) -> float:
    """Return the largest difference in any of a network's outputs."""
    found = named_tensors(outputs)
    return max((found[name] - tensor).abs().max().item() for name, tensor in wanted.items())


def planned_within(
    macs: float, name: str, network: Network, model: nn.Module, batch: Tensor
) -> tuple[nn.Module, Plan]:
    """Plan and fit a student within this number of multiply-adds."""
    settings = Compression(macs=macs, sources=2, transform_size=network.transform_size, floor=0.25)
    return compress(model, batch, settings, name=network.architecture(name))


def take_a_step(name: str, student: nn.Module, images: Tensor) -> None:
    """Run a copy of `student` forward and backward in training mode.

    RuntimeError unless every parameter gets a gradient of numbers.
    """
    trained = copy.deepcopy(student).train()
    outputs = named_tensors(trained(images)).values()
    # As classes, whatever they are.
    torch.stack([F.cross_entropy(x, x.detach().argmin(1)) for x in outputs]).sum().backward()
    for parameter_name, parameter in trained.named_parameters():
        if parameter.grad is None or not parameter.grad.isfinite().all():
            raise RuntimeError(f"{name}: {parameter_name} has no finite gradient")


def left_dense(plan: Plan) -> dict[str, int]:
    """Count the reasons of the layers that stay dense, the most frequent first, without figures."""
    reasons = (
        layer.reason.partition(";")[0]
        for layer in plan.layers.values()
        if isinstance(layer, DenseLayer)
    )
    return dict(Counter(reasons).most_common())


def markdown(report: dict) -> str:
    """Write the page: what was done, and one row per network."""
    rows = report["networks"]
    worst = max(row["difference"]["onnx"] for row in rows.values())
    fused = max(row["difference"]["optimized"] for row in rows.values())
    # Rows of earlier runs may lack what is compared in double.
    doubles = [row["difference"] for row in rows.values() if "rounding" in row["difference"]]
    own = max((row["rounding"] for row in doubles), default=0.0)
    convolutions = sum(row["convolutions"] for row in rows.values())
    converted = sum(row["converted"] for row in rows.values())
    seconds = sum(sum(row["cpu_seconds"].values()) for row in rows.values())
    missing = [name for name in NETWORKS if name not in rows]
    done = (
        f"`benchmarks/models.py` writes this page ({report['date']}, torch {report['torch']}). It "
        f"planned {len(rows)} networks at {SHARE:g} of their multiply-adds, or more where other "
        "operators than convolutions do most of the work. Each was converted, run forward and "
        f"backward, saved, loaded, optimized and exported. Of {convolutions} convolutions "
        f"{converted} became SBF layers; each of the others has its reason below. All of it took "
        f"{seconds / 60:.0f} minutes of one core's time."
    )
    meaning = (
        f"The weights are random, and the {report['images']} calibration images are smooth noise. "
        "So this page says what can be converted, not what accuracy is left. The budget holds at "
        'the size "planned at"; multiply-adds (M) are those at the network\'s own size. A loaded '
        "student gives exactly the outputs that were saved. Those of the optimized network differ "
        f"by at most {fused:.1e} of the largest output, those of the ONNX file in ONNX Runtime by "
        f"at most {worst:.1e}. The student itself differs by up to {own:.1e} between float32 and "
        f"double. In double, the optimized network differs by no more than {EXACT:g} "
        f"({len(doubles)} networks were compared)."
    )
    lines = [
        "# Which networks work",
        "",
        textwrap.fill(done, 100),
        "",
        textwrap.fill(meaning, 100),
        "",
        *([textwrap.fill(f"Not measured: {', '.join(missing)}.", 100), ""] if missing else []),
        "| network | size | planned at | asked | MACs | after | layers | SBF | ONNX differs by |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['size']} | {row['planned_size']} | {row['asked']:g} | "
            f"{row['macs_before'] / 1e6:.1f} | "
            f"{row['macs_after'] / 1e6:.1f} | {row['convolutions']} | {row['converted']} | "
            f"{row['difference']['onnx']:.0e} |"
        )
    lines += ["", "## Why layers stay dense", "", "| network | layers | reason |", "|---|---:|---|"]
    for name, row in rows.items():
        lines += [f"| {name} | {number} | {reason} |" for reason, number in row["dense"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the networks through all steps, and write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=4, help="calibration images")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # What is not folded is reported elsewhere.
    logging.getLogger("sbf_dist").setLevel(logging.ERROR)
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    rows: dict[str, dict] = known.get("networks", {})
    for name in track(options.models):
        rows[name] = check(name, NETWORKS[name], options.images)
        gc.collect()
        report = {
            "machine": machine(),
            "threads": options.threads,
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "torch": torch.__version__,
            "images": options.images,
            "networks": {name: rows[name] for name in NETWORKS if name in rows},
        }
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
    if options.markdown:
        options.markdown.write_text(markdown(report))


if __name__ == "__main__":
    main()
