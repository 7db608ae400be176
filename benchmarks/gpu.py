"""Builds the CUDA kernels, checks them against float64 and times them; needs one CUDA device.

Needs torch (2.11 or later), torchvision, pybind11, setuptools and nvcc; nothing of the package's
other dependencies. The extension is built for the GPU at hand only, in a folder of its own, so the
checkout is not touched. benchmarks/gpu.sh runs the tests as well.

    python benchmarks/gpu.py [--quick] [--json FILE] [--built FOLDER] [--only PART …]

The JSON is written anew after each part. Times are medians of CUDA events. The second-level cache
is flushed before each run of a kernel or layer, as a network's other layers would; whole networks
run in a loop. "Of copy" compares with Tensor.copy_ of the same number of bytes, so 1.00 is the
bandwidth that a plain copy of this size reaches, its launch included.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from gpu_build import build, require_device
from gpu_networks import Timer, compiled_rows, layer_rows, network_rows, speedups
from gpu_problems import (
    LAYOUTS,
    check_all,
    check_cases,
    name_of,
    random_features,
    random_transforms,
    random_wiring,
)

# (channels of the output, height and width) of ResNet-50's convolutions.
EXPAND_SHAPES = [
    (64, 56),
    (256, 56),
    (128, 28),
    (512, 28),
    (256, 14),
    (1024, 14),
    (512, 7),
    (2048, 7),
]
# (C_in, C_out, height and width, kernel size)
LAYER_SHAPES = [
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


# ---------------------------------------------------------------- timers


def kernel_timer(repeats: int) -> Timer:
    """Make a timer of single calls, each with a cold second-level cache."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    # While the device does this, the host gets ahead of it, by about a millisecond: launches are
    # not part of the time, not even those of a layer's backward pass.
    flushes = 10

    def measure(call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        events = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(flushes):
                flush.zero_()
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events)

    return measure


def loop_timer(repeats: int, budget_ms: float = 80) -> Timer:
    """Make a timer of calls in a loop, with all that the host does for them."""

    def measure(call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        before = time.perf_counter()
        call()
        torch.cuda.synchronize()
        once = 1000 * (time.perf_counter() - before)
        calls = max(3, min(100, round(budget_ms / once)))
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / calls)
        return statistics.median(times)

    return measure


# ---------------------------------------------------------------- kernels


def copy_ms(timer: Timer, bytes_moved: int, device: str) -> float:
    """Time a copy that reads and writes `bytes_moved` bytes in all."""
    source = torch.zeros(max(1, bytes_moved // 2), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return timer(lambda: target.copy_(source))


def expand_rows(
    timer: Timer, device: str, batch: int, shapes: Iterable[tuple[int, int]], variants: Iterable
) -> list[dict]:
    """Time expand and its gradients; variants: (dtype, layout, ratio, sources each)."""
    ops = torch.ops.sbf
    rows = []
    for dtype, layout, ratio, per_channel in variants:
        for channels, side in shapes:
            basis = round(channels * ratio)
            sources, order = random_wiring(channels, basis, per_channel, device)
            transforms = random_transforms(channels - basis, per_channel, 3, dtype, device)
            bias = torch.zeros(channels, dtype=dtype, device=device)
            z = random_features((batch, basis, side, side), dtype, layout, device)
            grad = random_features((batch, channels, side, side), dtype, layout, device)
            moved = (z.numel() + grad.numel()) * z.element_size()
            copied = copy_ms(timer, moved, device)
            calls = {
                "expand": partial(ops.expand, z, transforms, sources, order, bias),
                "grad_input": partial(ops.expand_grad_input, grad, transforms, sources, order),
                "grad_transforms": partial(ops.expand_grad_transforms, grad, z, sources, order, 3),
            }
            for operator, call in calls.items():
                ms = timer(call)
                rows.append(
                    {
                        "operator": operator,
                        "dtype": name_of(dtype),
                        "layout": layout,
                        "batch": batch,
                        "channels": channels,
                        "side": side,
                        "ratio": ratio,
                        "sources": per_channel,
                        "ms": ms,
                        "copy_ms": copied,
                        "gb_per_s": moved / ms / 1e6,
                        "of_copy": copied / ms,
                    }
                )
    return rows


# ---------------------------------------------------------------- report


def table(title: str, rows: list[dict]) -> str:
    """Write rows as a table; columns are the keys of the first."""
    if not rows:
        return f"\n{title}: nothing\n"

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, list):
            return "x".join(map(str, value))
        return str(value)

    cells = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(text.rjust(w) for text, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(["", title, *lines])


def environment() -> dict:
    """Say what was measured where."""
    device = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "gpu": device.name,
        "multiprocessors": device.multi_processor_count,
        "driver": driver.stdout.splitlines()[0].strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
    }


def measure_checks(report: dict, quick: bool) -> None:
    """Compare every operator with float64."""
    # cuDNN's tf32 would blur the float32 convolutions of the reference.
    torch.backends.cudnn.allow_tf32 = False
    report["checks"] = check_all("cuda", check_cases(quick))
    torch.backends.cudnn.allow_tf32 = True
    print(f"{report['checks']['cases']} cases, {len(report['checks']['failures'])} failures")
    for failure in report["checks"]["failures"]:
        print(f"  {failure}")


def measure_kernels(report: dict, quick: bool) -> None:
    """Time expand and its gradients."""
    timer = kernel_timer(10 if quick else 30)
    large = 256 << 20
    report["copy_gb_per_s"] = 2 * large / copy_ms(timer, 2 * large, "cuda") / 1e6
    print(f"copy: {report['copy_gb_per_s']:.0f} GB/s, read and written")
    half, ratios = torch.float16, (0.5, 0.25)
    variants = [(half, "channels_last", ratio, s) for ratio in ratios for s in (1, 4)]
    if not quick:
        variants += [(half, "contiguous", ratio, 1) for ratio in ratios]
        variants += [(torch.float32, layout, 0.5, 1) for layout in LAYOUTS]
    report["expand"] = expand_rows(timer, "cuda", 64, EXPAND_SHAPES, variants)
    print(table("expand and its gradients, cold cache", report["expand"]))


def measure_layers(report: dict, quick: bool) -> None:
    """Time layers, dense and SBF."""
    timer = kernel_timer(10 if quick else 30)
    shapes = LAYER_SHAPES[4:6] if quick else LAYER_SHAPES
    report["layers"] = layer_rows(timer, "cuda", torch.float16, 64, shapes)
    print(table("layers, channels_last, cold cache", report["layers"]))


def measure_networks(report: dict, quick: bool) -> None:
    """Time ResNet-50, dense and SBF."""
    timer = loop_timer(3 if quick else 5)
    report["networks"] = network_rows(
        timer, "cuda", torch.float16, (1, 32) if quick else (1, 32, 256)
    )
    if not quick:
        report["networks"] += network_rows(timer, "cuda", torch.float32, (32, 256))
    report["network_speedups"] = speedups(report["networks"])
    print(table("ResNet-50", report["networks"]))
    print(table("best dense over SBF", report["network_speedups"]))


def measure_compiled(report: dict, _quick: bool) -> None:
    """Time the dense ResNet-50 as torch.compile makes it."""
    report["compiled"] = compiled_rows(loop_timer(3), "cuda", torch.float16, (32, 256))
    print(table("dense ResNet-50, torch.compile", report["compiled"]))


PARTS: dict[str, Callable[[dict, bool], None]] = {
    "checks": measure_checks,
    "kernels": measure_kernels,
    "layers": measure_layers,
    "networks": measure_networks,
    "compiled": measure_compiled,
}


def measure(parts: Iterable[str], quick: bool, target: Path | None) -> dict:
    """Run parts in order; the report so far is written to `target` after each."""
    report = environment()
    print(json.dumps(report), flush=True)
    for part in parts:
        # The checks compare with one algorithm; times are those of the fastest.
        torch.backends.cudnn.benchmark = part != "checks"
        begun = time.perf_counter()
        PARTS[part](report, quick)
        report.setdefault("seconds", {})[part] = round(time.perf_counter() - begun, 1)
        print(f"[{report['seconds'][part]:.0f} s] {part}", flush=True)
        if target:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> int:
    """Build, check, time, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument(
        "--built", type=Path, metavar="FOLDER", help="use what gpu_build.py has built there"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help=", ".join(PARTS),
    )
    options = parser.parse_args()
    require_device("benchmarks/gpu.py")
    with tempfile.TemporaryDirectory(prefix="sbf-gpu-") as temporary:
        begun = time.perf_counter()
        folder = options.built or Path(temporary)
        if not options.built:
            build(folder)
        sys.path.insert(0, str(folder))
        import sbf_dist.ops  # registers the operators

        print(f"built and loaded in {time.perf_counter() - begun:.0f} s: {sbf_dist.__path__[0]}")
        report = measure(options.only, options.quick, options.json)
    return 1 if report.get("checks", {}).get("failures") else 0


if __name__ == "__main__":
    sys.exit(main())
