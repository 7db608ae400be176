"""SBF layers beside the dense convolutions that they replace, on a CPU.

    python benchmarks/layer.py --json benchmarks/results/layer.json

Ten layers of ResNet-50, fp32, two threads, random sources, m = 3. `dense` is nn.Conv2d, or the same
with its weights in oneDNN's blocks where that is faster (blocked); `basis` the convolution with the
kept filters alone; `composed` the SBF layer from PyTorch's operators (gather, depthwise
convolution, concatenate, gather); `sbf` the layer as sbf_dist.export.optimize makes it. All of one
layer and batch take turns in one process. A speed-up divides the fastest dense time of both layouts
by that of the layer.

The training step is forward and backward with gradients of input, weights and bias, batch 8.
"""

import argparse
import datetime
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timing import interleaved_medians, machine, pin_malloc
from torch import Tensor, nn

from sbf_dist.export.fused import FusedConv2d, FusedSBFConv2d
from sbf_dist.layers import SBFConv2d
from sbf_dist.ops import expand_reference

SHAPES = [
    (64, 64, 56, 3),
    (128, 128, 28, 3),
    (256, 256, 14, 3),
    (512, 512, 7, 3),
    (256, 64, 56, 1),
    (64, 256, 56, 1),
    (512, 128, 28, 1),
    (128, 512, 28, 1),
    (1024, 256, 14, 1),
    (256, 1024, 14, 1),
]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
RATIOS = (0.5, 0.25)
THREADS = 2
Shape = tuple[int, int, int, int]


def sbf_layer(dense: nn.Conv2d, ratio: float, sources: int) -> SBFConv2d:
    """Keep every 1 / ratio-th filter of `dense`; the sources are drawn at random."""
    kept = list(range(0, dense.out_channels, round(1 / ratio)))
    draw = torch.Generator().manual_seed(0)
    rebuilt = dense.out_channels - len(kept)
    drawn = torch.randint(len(kept), (rebuilt, sources), generator=draw).tolist()
    return SBFConv2d.from_conv(dense, kept, [[kept[i] for i in row] for row in drawn])


def composed(layer: SBFConv2d, x: Tensor) -> Tensor:
    """Compute the layer with PyTorch's own operators."""
    return expand_reference(
        layer.basis(x), layer.transforms, layer.sources, layer.order, layer.bias
    )


def measure(shape: Shape, batch: int, sources: tuple[int, ...], layouts: list[str]) -> list[dict]:
    """Return the rows of one layer at one batch size."""
    inputs, outputs, size, kernel = shape
    torch.manual_seed(0)
    calls: dict[str, Callable[[], object]] = {}
    for layout, memory_format in LAYOUTS.items():
        x = torch.randn(batch, inputs, size, size).contiguous(memory_format=memory_format)
        dense = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        dense = dense.to(memory_format=memory_format).requires_grad_(False)
        calls[f"{layout}/dense"] = lambda m=dense, x=x: m(x)
        if layout == "channels_last":
            blocked = FusedConv2d(dense, "none")
            calls[f"{layout}/blocked"] = lambda m=blocked, x=x: m(x)
        if layout not in layouts:
            continue
        for ratio in RATIOS:
            for s in sources:
                layer = sbf_layer(dense, ratio, s)
                fused = FusedSBFConv2d(layer, "none")
                name = f"{layout}/{ratio}"
                calls.setdefault(f"{name}/basis", lambda m=layer.basis, x=x: m(x))
                calls[f"{name}/{s}/composed"] = lambda m=layer, x=x: composed(m, x)
                calls[f"{name}/{s}/sbf"] = lambda m=fused, x=x: m(x)
    with torch.inference_mode():
        times = interleaved_medians(calls, rounds=7, repeats=3)
    return [
        {
            "shape": list(shape),
            "ratio": ratio,
            "sources": s,
            "layout": layout,
            "batch": batch,
            "dense_ms": times[f"{layout}/dense"],
            "dense_best_ms": min(t for n, t in times.items() if n.endswith(("dense", "blocked"))),
            "basis_ms": times[f"{layout}/{ratio}/basis"],
            "composed_ms": times[f"{layout}/{ratio}/{s}/composed"],
            "sbf_ms": times[f"{layout}/{ratio}/{s}/sbf"],
        }
        for layout in layouts
        for ratio in RATIOS
        for s in sources
    ]


def measure_training(shape: Shape) -> dict:
    """Time forward and backward of the dense layer and of the SBF layer with half its filters."""
    inputs, outputs, size, kernel = shape
    torch.manual_seed(0)
    calls: dict[str, Callable[[], object]] = {}
    kept_bytes: dict[str, int] = {}
    for layout, memory_format in LAYOUTS.items():
        x = torch.randn(8, inputs, size, size).contiguous(memory_format=memory_format)
        x.requires_grad_()
        grad = torch.randn(8, outputs, size, size).contiguous(memory_format=memory_format)
        dense = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        dense = dense.to(memory_format=memory_format)
        layer = sbf_layer(dense, 0.5, 1)

        def step(module: nn.Module, x: Tensor = x, grad: Tensor = grad) -> None:
            torch.autograd.grad(module(x), [x, *module.parameters()], grad)

        calls[f"{layout}/dense"] = lambda m=dense, step=step: step(m)
        calls[f"{layout}/sbf"] = lambda m=layer, step=step: step(m)
        kept_bytes[layout] = kept_for_backward(layer, x)
    times = interleaved_medians(calls, rounds=5, repeats=3)
    best = {name: min(times[f"{layout}/{name}"] for layout in LAYOUTS) for name in ("dense", "sbf")}
    pixels = 8 * size * size
    return {
        "shape": list(shape),
        "ratio": 0.5,
        "sources": 1,
        "batch": 8,
        **{f"{key.replace('/', '_')}_ms": value for key, value in times.items()},
        "speedup": best["dense"] / best["sbf"],
        "speedup_channels_last": best["dense"] / times["channels_last/sbf"],
        "activation_bytes": kept_bytes["channels_last"],
        "input_and_basis_bytes": 4 * pixels * (inputs + outputs // 2),
    }


def kept_for_backward(layer: nn.Module, x: Tensor) -> int:
    """Return the bytes of activations that a forward pass keeps, each memory counted once."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def describe(shape: list[int]) -> str:
    """Name a layer in a table."""
    inputs, outputs, size, kernel = shape
    return f"{inputs}→{outputs}, {size} px, {kernel} x {kernel}"


def geomean(values: list[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def speedups(rows: list[dict], batch: int, sources: int, *, free: bool) -> dict[str, float]:
    """Return the geometric mean by ratio; `free`: each layer in the layout that suits it."""
    found = {}
    for ratio in RATIOS:
        chosen = [
            row
            for row in rows
            if (row["batch"], row["sources"], row["ratio"]) == (batch, sources, ratio)
        ]
        best = []
        for shape in {tuple(row["shape"]) for row in chosen}:
            times = [
                row["sbf_ms"]
                for row in chosen
                if tuple(row["shape"]) == shape and (free or row["layout"] == "channels_last")
            ]
            dense = next(r["dense_best_ms"] for r in chosen if tuple(r["shape"]) == shape)
            best.append(dense / min(times))
        found[str(ratio)] = round(geomean(best), 3)
    return found


def show(rows: list[dict], training: list[dict]) -> None:
    """Print the rows of channels_last, and of training."""
    console = Console(width=110)
    table = Table("layer", "batch", "kept", "S", "dense ms", "basis", "composed", "sbf", "speed-up")
    for row in rows:
        if row["layout"] != "channels_last":
            continue
        times = [f"{row[f'{name}_ms']:.2f}" for name in ("basis", "composed", "sbf")]
        table.add_row(
            describe(row["shape"]),
            str(row["batch"]),
            str(row["ratio"]),
            str(row["sources"]),
            f"{row['dense_best_ms']:.2f}",
            *times,
            f"{row['dense_best_ms'] / row['sbf_ms']:.2f}",
        )
    console.print(table)
    if training:
        table = Table("training step", "dense ms", "sbf ms", "speed-up")
        for row in training:
            table.add_row(
                describe(row["shape"]),
                f"{row['channels_last_dense_ms']:.2f}",
                f"{row['channels_last_sbf_ms']:.2f}",
                f"{row['speedup']:.2f}",
            )
        console.print(table)


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--quick", action="store_true", help="batch 8, channels_last, one source, no training"
    )
    options = parser.parse_args()
    pin_malloc()
    torch.set_num_threads(THREADS)
    batches, sources = ((8,), (1,)) if options.quick else ((1, 8), (1, 4))
    layouts = ["channels_last"] if options.quick else list(LAYOUTS)
    rows = [
        row
        for batch in batches
        for shape in SHAPES
        for row in measure(shape, batch, sources, layouts)
    ]
    training = [] if options.quick else [measure_training(shape) for shape in SHAPES]
    show(rows, training)
    means = {
        f"batch {batch}, S={s}, {'free layout' if free else 'channels_last'}": speedups(
            rows, batch, s, free=free
        )
        for batch in batches
        for s in sources
        for free in ((False,) if options.quick else (False, True))
    }
    for name, values in means.items():
        print(f"{name}: " + ", ".join(f"{r} kept {v:.2f}x dense" for r, v in values.items()))
    if options.json:
        result = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "threads": THREADS,
            "torch": torch.__version__,
            "rows": rows,
            "geomean_speedup": speedups(rows, 8, 1, free=False),
            "geomean_speedups": means,
            "training": training,
            "training_geomean_speedup": (
                round(geomean([row["speedup"] for row in training]), 3) if training else None
            ),
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
