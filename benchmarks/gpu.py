"""Builds the CUDA kernels, checks them against float64 and times them; needs one CUDA device.

Needs torch (2.11 or later), torchvision, pybind11, setuptools and nvcc; nothing of the package's
other dependencies. The extension is built for the GPU at hand only, in a folder of its own, so the
checkout is not touched. All of it takes less than eight minutes, the build included.

    python benchmarks/gpu.py [--quick] [--json FILE] [--build FOLDER | --no-build]

Times are medians of CUDA events. The second-level cache is flushed before each run of a kernel or
layer, as a network's other layers would; whole networks run in a loop. "Of copy" compares with
Tensor.copy_ of the same number of bytes, so 1.00 is the bandwidth that a plain copy of this size
reaches, its launch included.
"""

import argparse
import datetime
import gc
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
import torch.nn.functional as F
from torch import Tensor, nn

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
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}
# Called with a function of no arguments; gives the median milliseconds of a call.
Timer = Callable[[Callable[[], object]], float]


def name_of(dtype: torch.dtype) -> str:
    """Give the name of a dtype without its module."""
    return str(dtype).removeprefix("torch.")


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


def in_graph(call: Callable[[], object]) -> Callable[[], object]:
    """Capture a call in a CUDA graph and give the function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


# ---------------------------------------------------------------- problems


def random_wiring(
    channels: int, basis: int, per_channel: int, device: str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Make `sources` and `order` of an SBF layer that keeps `basis` of its channels at random."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.zeros(channels, dtype=torch.bool)
    kept[torch.randperm(channels, generator=generator)[:basis]] = True
    # As SBFConv2d has it: kept and rebuilt channels each in ascending order.
    order = torch.where(kept, kept.cumsum(0) - 1, basis + (~kept).cumsum(0) - 1)
    sources = torch.randint(0, basis, (channels - basis, per_channel), generator=generator)
    return sources.to(device), order.to(device)


def random_features(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str, seed: int = 0
) -> Tensor:
    """Make normally distributed features in a layout."""
    generator = torch.Generator(device).manual_seed(seed)
    features = torch.randn(shape, generator=generator, device=device).to(dtype)
    return features.contiguous(memory_format=LAYOUTS[layout])


def random_transforms(
    rebuilt: int, per_channel: int, size: int, dtype: torch.dtype, device: str
) -> Tensor:
    """Make transformations that keep the variance of what they are applied to."""
    generator = torch.Generator().manual_seed(1)
    scale = (per_channel * size * size) ** -0.5
    shape = (rebuilt, per_channel, size, size)
    return (scale * torch.randn(shape, generator=generator)).to(device, dtype)


# ---------------------------------------------------------------- correctness


def poison(*sizes: int, dtype: torch.dtype, device: str) -> None:
    """Fill what the allocator will hand out next with NaN."""
    blocks = [torch.full((size,), float("nan"), dtype=dtype, device=device) for size in sizes * 2]
    del blocks


def error_of(got: Tensor, exact: Tensor) -> float:
    """Give the largest error relative to the largest value; infinite where `got` is not finite."""
    if got.shape != exact.shape:
        raise AssertionError(f"the shape is {tuple(got.shape)}, not {tuple(exact.shape)}")
    if got.numel() == 0:
        return 0.0
    if not torch.isfinite(got).all():
        return float("inf")
    scale = exact.abs().max().clamp_min(1)
    return ((got.to(exact) - exact).abs().max() / scale).item()


def check_case(
    shape: tuple[int, int, int, int, int],
    per_channel: int,
    size: int,
    layout: str,
    dtype: torch.dtype,
    activation: str,
    device: str,
) -> dict[str, float]:
    """Run every operator on one problem and give its error against float64.

    shape: batch, basis, rebuilt, height, width.
    """
    from sbf_dist.ops import expand, expand_reference, sbf_conv2d, sbf_conv2d_reference

    batch, basis, rebuilt, height, width = shape
    channels = basis + rebuilt
    sources, order = random_wiring(channels, basis, per_channel, device)
    transforms = random_transforms(rebuilt, per_channel, size, dtype, device)
    bias = random_features((channels, 1, 1, 1), dtype, "contiguous", device).flatten()
    z = random_features((batch, basis, height, width), dtype, layout, device)
    grad = random_features((batch, channels, height, width), dtype, layout, device, seed=2)
    outputs = (grad.numel(), z.numel(), transforms.numel())

    mine = [t.clone().requires_grad_() for t in (z, transforms, bias)]
    exact = [t.detach().double().requires_grad_() for t in (z, transforms, bias)]
    poison(*outputs, dtype=dtype, device=device)
    y = expand(mine[0], mine[1], sources, order, mine[2])
    y_exact = expand_reference(exact[0], exact[1], sources, order, exact[2])
    errors = {"expand": error_of(y, y_exact)}
    y_exact.backward(grad.double())
    poison(*outputs, dtype=dtype, device=device)
    y.backward(grad)
    for name, got, wanted in zip(
        ("grad_z", "grad_transforms", "grad_bias"), mine, exact, strict=True
    ):
        assert got.grad is not None and wanted.grad is not None
        errors[name] = error_of(got.grad, wanted.grad)

    # A 1 x 1 convolution with one input for each output adds no rounding of its own.
    weight = torch.eye(basis, dtype=dtype, device=device).view(basis, basis, 1, 1)
    residual = random_features(grad.shape, dtype, layout, device, seed=3)
    poison(*outputs, dtype=dtype, device=device)
    y = sbf_conv2d(z, weight, transforms, sources, order, bias, residual, activation=activation)
    wanted = sbf_conv2d_reference(
        z.double(),
        weight.double(),
        transforms.double(),
        sources,
        order,
        bias.double(),
        residual.double(),
        activation=activation,
    )
    return errors | {"conv2d": error_of(y, wanted)}


def check_cases(quick: bool) -> Iterable[tuple]:
    """Give arguments for check_case: odd shapes, every layout, dtype and activation."""
    shapes = [
        (2, 19, 33, 9, 13),
        (3, 37, 70, 15, 14),
        (1, 1, 1, 1, 1),
        (2, 64, 64, 56, 56),
        (5, 24, 40, 7, 7),
        (2, 128, 384, 28, 28),
        (1, 2048, 16, 5, 4),
    ]
    activations = ("none", "relu", "relu6", "silu", "hardswish")
    count = 0
    for shape in shapes[: 4 if quick else None]:
        for per_channel, size in ((1, 3), (4, 3), (2, 5), (1, 1)):
            for layout in LAYOUTS:
                for dtype in TOLERANCES:
                    yield shape, per_channel, size, layout, dtype, activations[count % 5]
                    count += 1


def check_all(device: str, cases: Iterable[tuple]) -> dict:
    """Check all cases; give their number, the worst errors and what was wrong."""
    worst: dict[str, float] = {}
    failures, count = [], 0
    for case in cases:
        dtype = case[4]
        count += 1
        for name, error in check_case(*case, device=device).items():
            key = f"{name}/{name_of(dtype)}"
            worst[key] = max(worst.get(key, 0.0), error)
            # Not `error > tolerance`: a NaN must fail.
            if not error <= TOLERANCES[dtype]:
                failures.append(f"{name} {case}: error {error:.3g}")
    return {"cases": count, "worst": worst, "failures": failures}


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


# ---------------------------------------------------------------- layers


def sbf_layer(conv: nn.Conv2d, basis: int, per_channel: int = 1, seed: int = 0) -> nn.Module:
    """Make the SBF layer that keeps `basis` random filters of `conv`."""
    from sbf_dist.layers import SBFConv2d

    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(conv.out_channels, generator=generator)[:basis].sort().values.tolist()
    rebuilt = conv.out_channels - basis
    chosen = torch.randint(0, basis, (rebuilt, per_channel), generator=generator).tolist()
    layer = SBFConv2d.from_conv(conv, kept, [[kept[b] for b in row] for row in chosen])
    device = str(conv.weight.device)
    with torch.no_grad():
        layer.transforms.copy_(
            random_transforms(rebuilt, per_channel, 3, layer.transforms.dtype, device)
        )
    return layer


def infer(module: nn.Module, x: Tensor) -> Tensor:
    """Run a module without a graph for gradients."""
    with torch.no_grad():
        return module(x)


def train(module: nn.Module, x: Tensor, grad: Tensor) -> None:
    """Run a module forward and backward, to the gradients of its input and parameters."""
    module.zero_grad(set_to_none=True)
    module(x.detach().requires_grad_()).backward(grad)


def layer_rows(
    timer: Timer,
    device: str,
    dtype: torch.dtype,
    batch: int,
    shapes: Iterable[tuple[int, int, int, int]],
    ratios: Iterable[float] = (0.5, 0.25),
) -> list[dict]:
    """Time SBF layers, their basis convolutions and dense layers, inference and training."""
    rows = []
    for c_in, c_out, side, kernel in shapes:
        conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, device=device, dtype=dtype)
        conv = conv.to(memory_format=torch.channels_last)
        x = random_features((batch, c_in, side, side), dtype, "channels_last", device)
        grad = random_features((batch, c_out, side, side), dtype, "channels_last", device)

        dense = timer(partial(infer, conv, x)), timer(partial(train, conv, x, grad))
        for ratio in ratios:
            layer = sbf_layer(conv, round(c_out * ratio))
            rows.append(
                {
                    "shape": [c_in, c_out, side, kernel],
                    "ratio": ratio,
                    "dtype": name_of(dtype),
                    "batch": batch,
                    "dense_ms": dense[0],
                    "basis_ms": timer(partial(infer, layer.basis, x)),
                    "sbf_ms": timer(partial(infer, layer, x)),
                    "dense_training_ms": dense[1],
                    "sbf_training_ms": timer(partial(train, layer, x, grad)),
                }
            )
    return rows


# ---------------------------------------------------------------- networks


class PlainConvolution(nn.Module):
    """A dense convolution with what follows it, as PyTorch runs it by itself."""

    def __init__(self, conv: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        self.conv, self.relu = conv, relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Give relu(conv(x) + residual)."""
        y = self.conv(x)
        if residual is not None:
            y += residual
        return F.relu_(y) if self.relu else y


class CudnnConvolution(PlainConvolution):
    """A dense convolution with what follows it as one operator of cuDNN."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Give relu(conv(x) + residual)."""
        conv = self.conv
        shape = (conv.stride, conv.padding, conv.dilation, conv.groups)
        if not self.relu:
            return conv(x)
        if residual is None:
            return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *shape)
        return torch.cudnn_convolution_add_relu(x, conv.weight, residual, 1.0, conv.bias, *shape)


class SbfConvolution(nn.Module):
    """An SBF layer at about half the multiply-adds of `conv`, with what follows it."""

    def __init__(self, conv: nn.Conv2d, relu: bool, seed: int) -> None:
        super().__init__()
        dense = conv.weight[0].numel()
        # Of C outputs, B cost `dense` and the others nine multiply-adds each.
        basis = conv.out_channels * (dense / 2 - 9) / (dense - 9)
        self.layer = sbf_layer(conv, max(8, 8 * round(basis / 8)), seed=seed)
        self.activation = "relu" if relu else "none"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Give relu(layer(x) + residual)."""
        layer = self.layer
        return torch.ops.sbf.conv2d(
            x,
            layer.basis.weight,
            layer.transforms,
            layer.sources,
            layer.order,
            layer.bias,
            residual,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            self.activation,
        )


class ResNet50(nn.Module):
    """torchvision's ResNet-50 with batch norm folded; convolutions are made by `make`.

    make: called with the folded convolution, whether a ReLU follows, and its number.
    """

    def __init__(self, make: Callable[[nn.Conv2d, bool, int], nn.Module]) -> None:
        super().__init__()
        from torch.nn.utils.fusion import fuse_conv_bn_eval
        from torchvision.models import resnet50

        torch.manual_seed(0)
        model = resnet50(weights=None).eval()
        self.stem = PlainConvolution(fuse_conv_bn_eval(model.conv1, model.bn1), relu=True)
        self.pool, self.classifier = model.maxpool, model.fc
        self.blocks = nn.ModuleList()
        number = 0
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in stage:
                parts = nn.ModuleDict()
                pairs = {
                    "reduce": (block.conv1, block.bn1),
                    "spatial": (block.conv2, block.bn2),
                    "widen": (block.conv3, block.bn3),
                }
                if block.downsample is not None:
                    pairs["shortcut"] = tuple(block.downsample)
                for name, (conv, norm) in pairs.items():
                    folded = fuse_conv_bn_eval(conv, norm)
                    parts[name] = make(folded, name != "shortcut", number)
                    number += 1
                self.blocks.append(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, 1000)."""
        x = self.pool(self.stem(x))
        for parts in self.blocks:
            shortcut = parts["shortcut"](x) if "shortcut" in parts else x
            x = parts["widen"](parts["spatial"](parts["reduce"](x)), shortcut)
        return self.classifier(x.mean((2, 3)))


NETWORKS: dict[str, Callable[[nn.Conv2d, bool, int], nn.Module]] = {
    "dense": lambda conv, relu, _: PlainConvolution(conv, relu),
    "dense, cuDNN fused": lambda conv, relu, _: CudnnConvolution(conv, relu),
    "SBF": SbfConvolution,
}


def multiply_adds(model: nn.Module, side: int, dtype: torch.dtype, device: str) -> int:
    """Count the multiply-adds of one image."""
    from torch.utils.flop_counter import FlopCounterMode

    x = random_features((1, 3, side, side), dtype, "channels_last", device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def network_rows(
    timer: Timer,
    device: str,
    dtype: torch.dtype,
    batches: Iterable[int],
    side: int = 224,
    names: Iterable[str] = tuple(NETWORKS),
    modes: dict[str, Callable] | None = None,
) -> list[dict]:
    """Time ResNet-50, dense and SBF, for each batch size; modes: how a call is run."""
    if modes is None:
        modes = {"eager": lambda call: call, "graph": in_graph}
    models = {}
    for name in names:
        model = ResNet50(NETWORKS[name]).requires_grad_(False)
        models[name] = model.to(device, dtype, memory_format=torch.channels_last)
    # cuDNN's fused operators are not counted: their network has the dense one's.
    macs = {
        name: multiply_adds(models[name], side, dtype, device)
        for name in models
        if name != "dense, cuDNN fused"
    }
    rows = []
    for batch in batches:
        x = random_features((batch, 3, side, side), dtype, "channels_last", device)
        for name, model in models.items():
            for mode, run_as in modes.items():
                ms = timer(run_as(partial(infer, model, x)))
                gc.collect()
                counted = macs.get(name, macs.get("dense"))
                rows.append(
                    {
                        "network": name,
                        "mode": mode,
                        "dtype": name_of(dtype),
                        "batch": batch,
                        "macs": counted,
                        "ms": ms,
                        "images_per_s": 1000 * batch / ms,
                    }
                )
    return rows


def speedups(rows: list[dict]) -> list[dict]:
    """Give, per batch size, the best dense time over the best SBF time of each mode."""
    ratios = []
    for batch, mode in dict.fromkeys((row["batch"], row["mode"]) for row in rows):
        here = [row for row in rows if (row["batch"], row["mode"]) == (batch, mode)]
        dense = min(row["ms"] for row in here if row["network"] != "SBF")
        sbf = min(row["ms"] for row in here if row["network"] == "SBF")
        ratios.append({"batch": batch, "mode": mode, "speedup": dense / sbf})
    return ratios


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

    def tell(what: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {what}", flush=True)

    tell("checking against float64")
    # cuDNN's tf32 would blur the float32 convolutions of the reference.
    torch.backends.cudnn.allow_tf32 = False
    report["checks"] = check_all("cuda", check_cases(quick))
    torch.backends.cudnn.allow_tf32 = True
    tell(f"{report['checks']['cases']} cases, {len(report['checks']['failures'])} failures")
    for failure in report["checks"]["failures"]:
        print(f"  {failure}")

    torch.backends.cudnn.benchmark = True
    timer = kernel_timer(10 if quick else 30)
    large = 256 << 20
    report["copy_gb_per_s"] = 2 * large / copy_ms(timer, 2 * large, "cuda") / 1e6
    tell(f"copy: {report['copy_gb_per_s']:.0f} GB/s, read and written")
    half, ratios = torch.float16, (0.5, 0.25)
    variants = [(half, "channels_last", ratio, s) for ratio in ratios for s in (1, 4)]
    if not quick:
        variants += [(half, "contiguous", ratio, 1) for ratio in ratios]
        variants += [(torch.float32, layout, 0.5, 1) for layout in LAYOUTS]
    report["expand"] = expand_rows(timer, "cuda", 64, EXPAND_SHAPES, variants)
    print(table("expand and its gradients, cold cache", report["expand"]), flush=True)
    tell("layers")
    shapes = LAYER_SHAPES[4:6] if quick else LAYER_SHAPES
    report["layers"] = layer_rows(timer, "cuda", half, 64, shapes)
    print(table("layers, channels_last, cold cache", report["layers"]), flush=True)
    tell("networks")
    batches = (1, 32) if quick else (1, 32, 256)
    report["networks"] = network_rows(loop_timer(3 if quick else 5), "cuda", half, batches)
    report["network_speedups"] = speedups(report["networks"])
    print(table("ResNet-50", report["networks"]), flush=True)
    print(table("best dense over SBF", report["network_speedups"]), flush=True)
    report["seconds"] = time.perf_counter() - started
    tell("done")
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
