"""Time and memory of fitting a large network, and its errors beside those of other methods.

`cost`: a network with random weights (batch norm measured, so that features neither vanish nor
explode) on structured noise of 224 px: seconds of each part, peak memory of the process and the
machine's load. Neither depends on the weights. It says nothing about accuracy. One network at a
time, as memory is the process's; of a file that has others their rows stay:

    for network in efficientnet_b0 resnet50 resnet152; do
        python benchmarks/fitting.py cost --network $network \
            --json benchmarks/results/fitting-cost.json
    done

`errors`: a small ResNet, trained for a minute to classify patches of 32 px by their photograph, of
ten. For each layer, the share of its output's variance (on other parts of the photographs, the
layer alone, means corrected) that is lost by SBF, by the SVD of its filters, and by Ghost modules
(one source each, in turn, with the largest filters), all at the multiply-adds of the SBF layer. It
shows how the methods approximate one trained layer on photographs, not how accurate networks are.
"""

import argparse
import json
import math
import os
import resource
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from timing import machine
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist import models
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.candidates import convolution
from sbf_dist.compression.fitting.layerwise import gather_layers
from sbf_dist.compression.fitting.statistics import Moments, measure_batch_norm
from sbf_dist.compression.fitting.transforms import fit_transforms, rank_channels
from sbf_dist.compression.one_shot import compress
from sbf_dist.compression.plan import SBFLayer

PHOTOGRAPHS = [
    *(("skimage.data", f) for f in ("astronaut.png", "chelsea.png", "coffee.png", "ihc.png")),
    *(("skimage.data", f) for f in ("hubble_deep_field.jpg", "motorcycle_left.png")),
    *(("skimage.data", f) for f in ("retina.jpg", "rocket.jpg")),
    *(("sklearn.datasets.images", f) for f in ("china.jpg", "flower.jpg")),
]
SIDE = 32
STEPS = 200  # of training
# Names as `models.build` takes them, and shares of the multiply-adds.
COSTS = {
    "efficientnet_b0": ("timm:efficientnet_b0", 0.75),
    "resnet50": ("torchvision:resnet50", 0.5),
    "resnet152": ("torchvision:resnet152", 0.5),
}


class Noise:
    """Images of smooth noise at several scales, generated again in each iteration."""

    def __init__(self, count: int, side: int, batch: int = 8) -> None:
        self.count, self.side, self.batch = count, side, batch

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.count, self.batch):
            generator = torch.Generator().manual_seed(start)
            images = torch.zeros(min(self.batch, self.count - start), 3, self.side, self.side)
            for scale in (4, 16, 64):
                coarse = torch.randn(len(images), 3, scale, scale, generator=generator)
                images += F.interpolate(coarse, self.side, mode="bilinear")
            yield images / math.sqrt(3)


def cost(images: int, side: int, macs: float, name: str) -> dict:
    """Compress a network with random weights; seconds of each part, and peak memory in GB.

    Processor seconds of all threads together are comparable on a busy machine. load: of the minute
    before, and in the end of the last five and fifteen.
    """
    torch.manual_seed(0)
    model = models.build(name, 1000).eval()
    noise = Calibration.of(Noise(images, side))
    measure_batch_norm(model, noise.first(16), 8)
    before, load = _peak_gb(), os.getloadavg()[0]
    seconds: dict[str, list[float]] = {}
    part, begun = "look at layers", _clocks()
    start = begun

    def progress(what: str, done: int, of: int) -> None:
        nonlocal part, begun
        now = _clocks()
        spent = seconds.setdefault(part, [0.0, 0.0])
        for clock in (0, 1):
            spent[clock] += now[clock] - begun[clock]
        part, begun = what, now
        print(f"\r{what} {done}/{of}   {now[0] - start[0]:.0f} s   ", end="", flush=True)

    _, plan = compress(model, noise, name=name, progress=progress, macs=macs)
    progress("", 1, 1)
    print()
    return {
        "network": name,
        "images": images,
        "side": side,
        "plan": plan.summary(),
        "macs_share": plan.macs_after / plan.macs_before,
        "seconds": {name: [round(clock, 1) for clock in pair] for name, pair in seconds.items()},
        "seconds_in_all": [round(b - a, 1) for a, b in zip(start, _clocks(), strict=True)],
        "peak_gb_before": before,
        "peak_gb": _peak_gb(),
        "load": [round(load, 1), *(round(average, 1) for average in os.getloadavg()[1:])],
        "threads": torch.get_num_threads(),
    }


def _clocks() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def _peak_gb() -> float:
    """Peak memory of this process: kilobytes, as Linux counts them."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


# --- errors of layers ----------------------------------------------------------------------------


def patches(per_photograph: int, *, seed: int, lower: bool) -> tuple[Tensor, Tensor]:
    """Return patches (N, 3, SIDE, SIDE) of the upper two thirds of photographs, or of the rest."""
    generator = np.random.default_rng(seed)
    images, labels = [], []
    for label, (package, name) in enumerate(PHOTOGRAPHS):
        with Image.open(str(files(package) / name)) as opened:
            photograph = opened.convert("RGB")
        width, height = photograph.size
        cut = 2 * height // 3
        top, bottom = (cut, height) if lower else (0, cut)
        for _ in range(per_photograph):
            side = int(generator.integers(SIDE, min(4 * SIDE, bottom - top)))
            left = int(generator.integers(0, width - side + 1))
            up = int(generator.integers(top, bottom - side + 1))
            patch = photograph.resize((SIDE, SIDE), box=(left, up, left + side, up + side))
            images.append(np.asarray(patch, dtype=np.float32) / 127.5 - 1)
            labels.append(label)
    order = generator.permutation(len(labels))
    stacked = torch.from_numpy(np.stack(images)[order]).permute(0, 3, 1, 2).contiguous()
    return stacked, torch.tensor(labels)[torch.from_numpy(order)]


def train(name: str, images: Tensor, labels: Tensor) -> nn.Module:
    """Train a network for STEPS steps to classify patches by photograph."""
    torch.manual_seed(0)
    model = models.build(name, len(PHOTOGRAPHS)).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS)
    for step in range(STEPS):
        chosen = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        print(f"\rtrain {step + 1}/{STEPS}, loss {loss.item():.2f}", end="", flush=True)
    print()
    return model.eval()


def errors(macs: float, name: str) -> dict:
    """Compare the approximations of each converted layer of a trained network."""
    images, labels = patches(400, seed=0, lower=False)
    others, other_labels = patches(60, seed=1, lower=True)
    model = train(name, images, labels)
    with torch.no_grad():
        top1 = float((model(others).argmax(1) == other_labels).float().mean())
        calibration, unseen = Calibration.of(images[:512]), Calibration.of(others)
        _, plan = compress(model, calibration, name=name, macs=macs)
        layers = {n: layer for n, layer in plan.layers.items() if isinstance(layer, SBFLayer)}
        sizes = dict.fromkeys(layers, 3)
        rows = {}
        pairs = zip(
            gather_layers(model, sizes, calibration),
            gather_layers(model, sizes, unseen),
            strict=True,
        )
        for (layer, seen), (_, held_out) in pairs:
            rows[layer] = layer_errors(convolution(model, layer), layers[layer], seen, held_out)
    means = {
        way: float(np.mean([row[way] for row in rows.values()]))
        for way in next(iter(rows.values()))
    }
    return {"network": name, "top1": top1, "macs": macs, "layers": rows, "mean": means}


def layer_errors(
    conv: nn.Conv2d, layer: SBFLayer, seen: Moments, unseen: Moments
) -> dict[str, float]:
    """Return the share of a layer's variance that each way loses at the SBF layer's cost.

    All are maps from the 3 x 3 shifts of the layer's outputs to the outputs, (C, C·9), fitted on
    `seen` and measured on `unseen`.
    """
    channels, cost = conv.out_channels, conv.weight[0].numel()
    macs = layer.macs_after / layer.macs_before * channels * cost
    generator = torch.Generator().manual_seed(0)
    rank = int(macs // (cost + channels))
    basis, *_ = torch.linalg.svd(conv.weight.flatten(1).double(), full_matrices=False)
    low_rank = _at_centre(basis[:, :rank] @ basis[:, :rank].T)

    kept = sorted(rank_channels(seen, torch.ones(channels, dtype=torch.double))[: len(layer.kept)])
    rebuilt = sorted(set(range(channels)) - set(kept))
    fit = fit_transforms(seen.restrict(kept), rebuilt, len(layer.sources[0]))
    sbf = _kept(channels, kept)
    for channel, sources, kernels in zip(
        rebuilt, fit.sources.tolist(), fit.transforms.flatten(2), strict=True
    ):
        for source, kernel in zip(sources, kernels, strict=True):
            sbf[channel, 9 * kept[source] : 9 * kept[source] + 9] = kernel

    own = int((macs - 9 * channels) // (cost - 9))
    largest = conv.weight.flatten(1).abs().sum(1).argsort(descending=True)
    kept = sorted(largest[:own].tolist())
    ghost = _kept(channels, kept)
    fitted = ghost.clone()
    for index, channel in enumerate(sorted(set(range(channels)) - set(kept))):
        source = kept[index % own]
        taps = slice(9 * source, 9 * source + 9)
        ghost[channel, taps] = torch.randn(9, generator=generator, dtype=torch.double) / 3
        one = fit_transforms(seen.restrict([source]), [channel], 1)
        fitted[channel, taps] = one.transforms.flatten()
    ways = {"sbf": sbf, "low_rank": low_rank, "ghost_fitted": fitted, "ghost_random": ghost}
    return {way: round(_lost(matrix, unseen), 4) for way, matrix in ways.items()}


def _at_centre(matrix: Tensor) -> Tensor:
    spread = torch.zeros(len(matrix), 9 * matrix.shape[1], dtype=torch.double)
    spread[:, 4::9] = matrix
    return spread


def _kept(channels: int, kept: list[int]) -> Tensor:
    matrix = torch.zeros(channels, channels, dtype=torch.double)
    matrix[kept, kept] = 1
    return _at_centre(matrix)


def _lost(matrix: Tensor, moments: Moments) -> float:
    explained = 2 * (matrix * moments.zy.T).sum() - ((matrix @ moments.zz) * matrix).sum()
    return float(1 - explained / moments.yy.sum())


def _is_file(path: Path | None) -> bool:
    return path is not None and path.is_file()


def main() -> None:
    """Run both parts, print their tables and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="*", choices=["cost", "errors"], default=["cost", "errors"])
    parser.add_argument("--network", choices=COSTS, default="resnet50", help="of part cost")
    parser.add_argument("--images", type=int, default=512, help="of part cost")
    parser.add_argument("--side", type=int, default=224, help="of part cost")
    parser.add_argument("--macs", type=float, help="of part cost its network's, or else 0.5")
    parser.add_argument("--trained", default="cifar_resnet14_w32", help="network of part errors")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict = {"machine": machine(), "threads": torch.get_num_threads()}
    if "cost" in options.part:
        name, share = COSTS[options.network]
        result = cost(options.images, options.side, options.macs or share, name)
        earlier = json.loads(options.json.read_text()) if _is_file(options.json) else {}
        report["cost"] = earlier.get("cost", {}) | {options.network: result}
        title = f"{options.network}, {options.images} images"
        table = Table("part", "s", "processor s", title=title)
        for name, pair in [*result["seconds"].items(), ("in all", result["seconds_in_all"])]:
            table.add_row(name, *(f"{value:.1f}" for value in pair))
        Console().print(table)
        print(result["plan"])
        print(f"peak memory {result['peak_gb']} GB ({result['peak_gb_before']} before)")
    if "errors" in options.part:
        result = errors(options.macs or 0.5, options.trained)
        report["errors"] = result
        print(f"{options.trained}: top-1 {100 * result['top1']:.1f} % on other parts of the photos")
        table = Table("layer", *result["mean"], title="share of a layer's variance that is lost")
        for name, row in [*result["layers"].items(), ("mean", result["mean"])]:
            table.add_row(name, *(f"{value:.3f}" for value in row.values()))
        Console().print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
