"""Builds the CUDA kernels, checks them against float64 and times them; needs one CUDA device.

Needs torch (2.11 or later), torchvision, pybind11, setuptools and nvcc; nothing of the package's
other dependencies. The extension is built for the GPU at hand only, in a folder of its own, so the
checkout is not touched. All of it should take less than eight minutes, the build included.

    python benchmarks/gpu.py [--quick] [--json FILE] [--build FOLDER | --no-build]

Times are medians of CUDA events. The second-level cache is flushed before each run of a kernel or
layer, as a network's other layers would; whole networks run in a loop. "Of copy" compares with
Tensor.copy_ of the same number of bytes, so 1.00 is the bandwidth that a plain copy of this size
reaches, its launch included.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from gpu_networks import Timer, layer_rows, network_rows, speedups
from gpu_problems import (
    LAYOUTS,
    check_all,
    check_cases,
    name_of,
    random_features,
    random_transforms,
    random_wiring,
)

ROOT = Path(__file__).parents[1]
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


# ---------------------------------------------------------------- build


def build(folder: Path) -> None:
    """Build sbf_dist._C for the device at hand in `folder`, a copy of what the build needs."""
    for part in ("csrc", "sbf_dist"):
        shutil.copytree(
            ROOT / part,
            folder / part,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("*.so", "__pycache__"),
        )
    # Without pyproject.toml, an old setuptools will do.
    shutil.copy(ROOT / "setup.py", folder)
    major, minor = torch.cuda.get_device_capability()
    environment = os.environ | {
        "SBF_DIST_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "MAX_JOBS": str(os.cpu_count() or 1),
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\nthe build failed: {' '.join(command)} in {folder}")


# ---------------------------------------------------------------- timers


def kernel_timer(repeats: int) -> Timer:
    """Make a timer of single calls, each with a cold second-level cache."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def measure(call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        events = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # While this runs, the host gets ahead: launches are not part of the time.
            flush.zero_()
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events)

    return measure


def loop_timer(repeats: int, budget_ms: float = 150) -> Timer:
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
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "gpu": device.name,
        "multiprocessors": device.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
    }


def measure(quick: bool) -> dict:
    """Check and time everything."""
    report = environment()
    print(json.dumps(report), flush=True)
    started = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {what}", flush=True)

    say("checking against float64")
    # cuDNN's tf32 would blur the float32 convolutions of the reference.
    torch.backends.cudnn.allow_tf32 = False
    report["checks"] = check_all("cuda", check_cases(quick))
    torch.backends.cudnn.allow_tf32 = True
    say(f"{report['checks']['cases']} cases, {len(report['checks']['failures'])} failures")
    for failure in report["checks"]["failures"]:
        print(f"  {failure}")

    torch.backends.cudnn.benchmark = True
    timer = kernel_timer(10 if quick else 30)
    large = 256 << 20
    report["copy_gb_per_s"] = 2 * large / copy_ms(timer, 2 * large, "cuda") / 1e6
    say(f"copy: {report['copy_gb_per_s']:.0f} GB/s, read and written")
    half, ratios = torch.float16, (0.5, 0.25)
    variants = [(half, "channels_last", ratio, s) for ratio in ratios for s in (1, 4)]
    if not quick:
        variants += [(half, "contiguous", ratio, 1) for ratio in ratios]
        variants += [(torch.float32, layout, 0.5, 1) for layout in LAYOUTS]
    report["expand"] = expand_rows(timer, "cuda", 64, EXPAND_SHAPES, variants)
    print(table("expand and its gradients, cold cache", report["expand"]), flush=True)
    say("layers")
    shapes = LAYER_SHAPES[4:6] if quick else LAYER_SHAPES
    report["layers"] = layer_rows(timer, "cuda", half, 64, shapes)
    print(table("layers, channels_last, cold cache", report["layers"]), flush=True)
    say("networks")
    batches = (1, 32) if quick else (1, 32, 256)
    report["networks"] = network_rows(loop_timer(3 if quick else 5), "cuda", half, batches)
    report["network_speedups"] = speedups(report["networks"])
    print(table("ResNet-50", report["networks"]), flush=True)
    print(table("best dense over SBF", report["network_speedups"]), flush=True)
    report["seconds"] = time.perf_counter() - started
    say("done")
    return report


def main() -> int:
    """Build, check, time, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--build", type=Path, metavar="FOLDER", help="build here and keep it")
    where.add_argument("--no-build", action="store_true", help="use the extension built in place")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and PyTorch finds none", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="sbf-gpu-") as temporary:
        begun = time.perf_counter()
        folder = ROOT
        if not options.no_build:
            folder = options.build or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            build(folder)
        sys.path.insert(0, str(folder))
        import sbf_dist.ops  # registers the operators

        print(f"built and loaded in {time.perf_counter() - begun:.0f} s: {sbf_dist.__path__[0]}")
        report = measure(options.quick)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["checks"]["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
