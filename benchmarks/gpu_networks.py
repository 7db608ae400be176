"""Layers and ResNet-50, dense and SBF, and the tables of their times on a device."""

import gc
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from gpu_problems import name_of, random_features, random_transforms
from torch import Tensor, nn

if TYPE_CHECKING:  # at run time, the package is that which the benchmark has built
    from sbf_dist.layers import SBFConv2d
    from sbf_dist.ops import Activation

# Called with a function of no arguments; gives the median milliseconds of a call.
Timer = Callable[[Callable[[], object]], float]


# ---------------------------------------------------------------- convolutions


class PlainConvolution(nn.Module):
    """A dense convolution with what follows it, as PyTorch runs it uncompiled."""

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
    """An SBF layer with what follows it as one operator."""

    def __init__(self, layer: "SBFConv2d", relu: bool) -> None:
        super().__init__()
        from sbf_dist.ops import sbf_conv2d

        self.operator = sbf_conv2d
        self.layer = layer
        self.activation: Activation = "relu" if relu else "none"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Give relu(layer(x) + residual)."""
        layer = self.layer
        return self.operator(
            x,
            layer.basis.weight,
            layer.transforms,
            layer.sources,
            layer.order,
            layer.bias,
            residual,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            activation=self.activation,
        )


# ---------------------------------------------------------------- layers


def sbf_layer(conv: nn.Conv2d, basis: int, per_channel: int = 1, seed: int = 0) -> "SBFConv2d":
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
    dense: Iterable[type[PlainConvolution]] = (PlainConvolution, CudnnConvolution),
) -> list[dict]:
    """Time SBF layers, their basis convolutions and dense layers, inference and training.

    Inference is a convolution with bias and ReLU, the dense one the fastest of `dense`; training is
    a convolution alone, as before batch norm.
    """
    rows = []
    for c_in, c_out, side, kernel in shapes:
        conv, plain = (
            nn.Conv2d(
                c_in, c_out, kernel, 1, kernel // 2, bias=bias, device=device, dtype=dtype
            ).to(memory_format=torch.channels_last)
            for bias in (True, False)
        )
        x = random_features((batch, c_in, side, side), dtype, "channels_last", device)
        grad = random_features((batch, c_out, side, side), dtype, "channels_last", device)

        dense_ms = min(timer(partial(infer, make(conv, relu=True), x)) for make in dense)
        dense_training_ms = timer(partial(train, plain, x, grad))
        for ratio in ratios:
            basis = round(c_out * ratio)
            layer = SbfConvolution(sbf_layer(conv, basis), relu=True)
            rows.append(
                {
                    "shape": [c_in, c_out, side, kernel],
                    "ratio": ratio,
                    "dtype": name_of(dtype),
                    "batch": batch,
                    "dense_ms": dense_ms,
                    "basis_ms": timer(partial(infer, layer.layer.basis, x)),
                    "sbf_ms": timer(partial(infer, layer, x)),
                    "dense_training_ms": dense_training_ms,
                    "sbf_training_ms": timer(partial(train, sbf_layer(plain, basis), x, grad)),
                }
            )
    return rows


# ---------------------------------------------------------------- networks


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


class ResNet50(nn.Module):
    """torchvision's ResNet-50 with batch norm folded; `make` builds its convolutions.

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


def at_half(conv: nn.Conv2d, relu: bool, seed: int) -> nn.Module:
    """Make the SBF layer of about half the multiply-adds of `conv`, with what follows it."""
    dense = conv.weight[0].numel()
    # Of C outputs, B cost `dense` and the others nine multiply-adds each.
    basis = conv.out_channels * (dense / 2 - 9) / (dense - 9)
    return SbfConvolution(sbf_layer(conv, max(8, 8 * round(basis / 8)), seed=seed), relu)


def spatial_at_half(conv: nn.Conv2d, relu: bool, seed: int) -> nn.Module:
    """Make an SBF layer of a 3 x 3 convolution, and leave the others to cuDNN."""
    if conv.kernel_size == (1, 1):
        return CudnnConvolution(conv, relu)
    return at_half(conv, relu, seed)


NETWORKS: dict[str, Callable[[nn.Conv2d, bool, int], nn.Module]] = {
    "dense": lambda conv, relu, _: PlainConvolution(conv, relu),
    "dense, cuDNN fused": lambda conv, relu, _: CudnnConvolution(conv, relu),
    "SBF": at_half,
    "SBF, 3 x 3 only": spatial_at_half,
}


def multiply_adds(make: Callable[[nn.Conv2d, bool, int], nn.Module], side: int) -> int:
    """Count the multiply-adds of the network that `make` gives, for one image."""
    from torch.utils.flop_counter import FlopCounterMode

    model = ResNet50(lambda *arguments: counted(make(*arguments)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() // 2


def counted(module: nn.Module) -> nn.Module:
    """Give a module whose operators PyTorch counts, which cuDNN's fused ones are not."""
    if isinstance(module, CudnnConvolution):
        return PlainConvolution(module.conv, module.relu)
    return module


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
    macs = {name: multiply_adds(NETWORKS[name], side) for name in models}
    rows = []
    for batch in batches:
        x = random_features((batch, 3, side, side), dtype, "channels_last", device)
        for name, model in models.items():
            for mode, run_as in modes.items():
                ms = timer(run_as(partial(infer, model, x)))
                gc.collect()
                rows.append(
                    {
                        "network": name,
                        "mode": mode,
                        "dtype": name_of(dtype),
                        "batch": batch,
                        "macs": macs[name],
                        "ms": ms,
                        "images_per_s": 1000 * batch / ms,
                    }
                )
    return rows


def compiled_rows(
    timer: Timer, device: str, dtype: torch.dtype, batches: Iterable[int], side: int = 224
) -> list[dict]:
    """Time the dense ResNet-50 compiled for each batch size, and the seconds that this takes."""
    rows = []
    model = ResNet50(NETWORKS["dense"]).requires_grad_(False)
    model.to(device, dtype, memory_format=torch.channels_last)
    for batch in batches:
        x = random_features((batch, 3, side, side), dtype, "channels_last", device)
        torch.compiler.reset()
        compiled = torch.compile(model, dynamic=False)
        begun = time.perf_counter()
        infer(compiled, x)
        seconds = time.perf_counter() - begun
        ms = timer(partial(infer, compiled, x))
        row = {"dtype": name_of(dtype), "batch": batch, "compile_s": seconds, "ms": ms}
        rows.append(row)
    return rows


def speedups(rows: list[dict]) -> list[dict]:
    """Give the best dense time over each SBF network's, by dtype, batch size and mode."""
    keys = ("dtype", "batch", "mode")
    dense: dict[tuple, float] = {}
    for row in rows:
        if not row["network"].startswith("SBF"):
            place = tuple(row[key] for key in keys)
            dense[place] = min(row["ms"], dense.get(place, row["ms"]))
    return [
        {key: row[key] for key in ("network", *keys)}
        | {"speedup": dense[tuple(row[key] for key in keys)] / row["ms"]}
        for row in rows
        if row["network"].startswith("SBF")
    ]
