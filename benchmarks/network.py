"""ResNet-50 on a CPU: dense, as an SBF network of half the multiply-adds, and pruned to as many.

    python benchmarks/network.py --json benchmarks/results/network.json

Latency follows from the architecture, not from the weights, so these are random, and the plans are
built by a rule; --plan FILE takes a plan of torchvision:resnet50 instead. One
source per rebuilt channel (S = 1), 3 x 3 transformations, kept channels evenly spread, sources
drawn at random (seed 0), and

  sbf          every convolution except the stem keeps the same share of its filters;
  sbf-narrow   those that widen (1 x 1, 64 -> 256, and the shortcuts), whose expand step writes
               most and saves least, stay dense, and the others keep a smaller share;
  pruned       the inner widths of all blocks are smaller by one factor (no layer is rebuilt).

Engines: eager (PyTorch, channels_last), fused (sbf_dist.export.optimize), inductor (the same,
torch.compile with freezing), onnxruntime, openvino (if it can be imported; in float32, which it
is not its default on a CPU with bfloat16).
"""

import argparse
import datetime
import json
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from timing import interleaved_medians, machine, pin_malloc
from torch import Tensor, nn

from sbf_dist.compression.convert import convert
from sbf_dist.compression.cost import count
from sbf_dist.compression.plan import DenseLayer, Plan, SBFLayer
from sbf_dist.export.onnx import export_onnx
from sbf_dist.export.optimize import optimize
from sbf_dist.export.saved import Card

NAME = "torchvision:resnet50"
INPUT = (3, 224, 224)
BLOCK = 16  # shares are rounded to this many channels, a vector of floats
Engine = Callable[[Tensor], object]


def resnet50(width: int = 64) -> nn.Module:
    """Build ResNet-50; `width` other than 64 scales the inner widths of its blocks."""
    torch.manual_seed(0)
    return torchvision.models.resnet50(width_per_group=width).eval()


def plan_by_rule(share: float, *, widening: bool, sources: int = 1) -> Plan:
    """Plan that keeps `share` of the filters; `widening` layers too, or these stay dense."""
    model = resnet50()
    dense = count(model, INPUT)
    draw = random.Random(0)
    layers: dict[str, SBFLayer | DenseLayer] = {}
    for name, conv in model.named_modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        macs, channels = dense.layers[name], conv.out_channels
        stem = conv.in_channels == 3
        if stem or (not widening and channels > conv.in_channels):
            reason = "stem" if stem else "it widens"
            layers[name] = DenseLayer(reason=reason, macs=macs, convertible=not stem)
            continue
        count_kept = max(BLOCK, BLOCK * round(share * channels / BLOCK))
        kept = [i * channels // count_kept for i in range(count_kept)]
        layers[name] = SBFLayer(
            channels=channels,
            kept=kept,
            sources=[draw.sample(kept, sources) for _ in range(channels - count_kept)],
            transform_size=3,
            macs_before=macs,
            macs_after=macs * count_kept // channels,
            error=0.0,
            reason="by rule",
        )
    return Plan(
        model=NAME,
        classes=1000,
        input_shape=INPUT,
        budget={"macs": 0.5},
        macs_before=dense.macs,
        macs_after=dense.macs,
        params_before=dense.params,
        params_after=dense.params,
        layers=layers,
    )


def half_by_rule(*, widening: bool) -> Plan:
    """Plan of half the multiply-adds, as near as rounding to whole vectors allows."""
    target = count(resnet50(), INPUT).macs / 2
    plans = [plan_by_rule(share / 64, widening=widening) for share in range(4, 60)]
    return min(plans, key=lambda plan: abs(count(convert(resnet50(), plan), INPUT).macs - target))


def pruned_to_half() -> nn.Module:
    """ResNet-50 with inner widths that give half the multiply-adds."""
    target = count(resnet50(), INPUT).macs / 2
    return min(
        (resnet50(width) for width in range(32, 56, 2)),
        key=lambda model: abs(count(model, INPUT).macs - target),
    )


def in_pytorch(model: nn.Module, *, compiled: bool = False) -> Engine:
    """Run `model` in PyTorch, on images in channels_last."""
    module = model.to(memory_format=torch.channels_last)
    run = torch.compile(module, fullgraph=True, dynamic=False) if compiled else module

    def call(images: Tensor) -> object:
        with torch.no_grad():
            return run(images)

    return call


def in_onnxruntime(path: Path, threads: int) -> Engine:
    """Run an ONNX file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images.contiguous().numpy()})


def in_openvino(path: Path, threads: int, batch: int) -> Engine:
    """Run an ONNX file in OpenVINO, in float32."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape([batch, *INPUT])
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda images: request.infer({0: images.contiguous().numpy()})


def has_openvino() -> bool:
    """Return whether OpenVINO can be imported."""
    try:
        import openvino  # noqa: F401
    except ImportError:
        return False
    return True


def engines(
    models: dict[str, nn.Module], batch: int, threads: int, folder: Path, *, compiled: bool
) -> dict[str, dict[str, Engine]]:
    """Make every engine of every network for this batch."""
    built: dict[str, dict[str, Engine]] = {}
    for name, model in models.items():
        path = folder / f"{name}.onnx"
        if not path.exists():
            export_onnx(model, path, _card())
        fused = optimize(model)
        built[name] = {"eager": in_pytorch(model), "fused": in_pytorch(fused)}
        if compiled:
            built[name]["inductor"] = in_pytorch(fused, compiled=True)
        built[name]["onnxruntime"] = in_onnxruntime(path, threads)
        if has_openvino():
            built[name]["openvino"] = in_openvino(path, threads, batch)
    return built


def _card() -> Card:
    return Card(
        model=NAME,
        classes=[str(i) for i in range(1000)],
        input_shape=INPUT,
        mean=[0.0] * 3,
        std=[1.0] * 3,
        plan_digest="",
    )


def check_agreement(built: dict[str, dict[str, Engine]], images: Tensor) -> None:
    """Raise RuntimeError unless all engines of a network compute the same logits."""
    for name, by_engine in built.items():
        expected = torch.as_tensor(by_engine["eager"](images))
        for engine, call in by_engine.items():
            found = call(images)
            if not isinstance(found, Tensor):
                (array,) = found if isinstance(found, list) else found.values()  # type: ignore
                found = torch.from_numpy(array)
            worst = ((found - expected).abs().max() / expected.abs().max()).item()
            if not worst < 1e-3:
                raise RuntimeError(f"{name} in {engine}: logits differ by {worst:.1e}")


def measure(
    models: dict[str, nn.Module], batch: int, threads: int, folder: Path, *, quick: bool
) -> dict[str, dict[str, float]]:
    """Return milliseconds by network and engine."""
    images = torch.randn(batch, *INPUT).contiguous(memory_format=torch.channels_last)
    built = engines(models, batch, threads, folder, compiled=not quick)
    check_agreement(built, images)
    planar = images.contiguous()
    calls: dict[str, Callable[[], object]] = {}
    for name, by_engine in built.items():
        for engine, call in by_engine.items():
            given = planar if engine in ("onnxruntime", "openvino") else images
            calls[f"{name} {engine}"] = lambda call=call, given=given: call(given)  # type: ignore
    per_round = max(1, (8 if quick else 24) // (4 * batch))
    medians = interleaved_medians(calls, rounds=5 if quick else 15, repeats=per_round)
    table: dict[str, dict[str, float]] = {}
    for key, value in medians.items():
        name, engine = key.split()
        table.setdefault(name, {})[engine] = round(value, 3)
    return table


def show(report: dict) -> None:
    """Print the tables."""
    for batch, rows in report["batch"].items():
        columns = list(rows["dense"])
        table = Table(title=f"ResNet-50, batch {batch}: milliseconds ({report['threads']} threads)")
        for heading in ("network", "MACs (G)", *columns, "best / best dense"):
            table.add_column(heading, justify="left" if heading == "network" else "right")
        for name, by_engine in rows.items():
            table.add_row(
                name,
                f"{report['macs'][name] / 1e9:.2f}",
                *(f"{by_engine.get(column, math.nan):.1f}" for column in columns),
                f"{report['ratio'][batch][name]:.3f}",
            )
        Console(width=120).print(table)
    if not has_openvino():
        print("OpenVINO is not installed: no row")


def main() -> None:
    """Measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plan", type=Path, help="a plan to measure instead of those by rule")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="batch 1 only, nothing compiled")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pin_malloc()
    torch._inductor.config.freezing = True
    models = {"dense": resnet50()}
    if options.plan:
        models["sbf"] = convert(resnet50(), Plan.load(options.plan)).eval()
    else:
        models["sbf"] = convert(resnet50(), half_by_rule(widening=True)).eval()
        models["sbf-narrow"] = convert(resnet50(), half_by_rule(widening=False)).eval()
    models["pruned"] = pruned_to_half()
    macs = {name: count(model, INPUT).macs for name, model in models.items()}
    report: dict = {
        "machine": machine(),
        "threads": options.threads,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "macs": macs,
        "batch": {},
        "ratio": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for batch in (1,) if options.quick else (1, 8):
            torch.compiler.reset()
            rows = measure(models, batch, options.threads, Path(folder), quick=options.quick)
            report["batch"][str(batch)] = rows
            best = {name: min(by_engine.values()) for name, by_engine in rows.items()}
            report["ratio"][str(batch)] = {
                name: round(value / best["dense"], 4) for name, value in best.items()
            }
    show(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
