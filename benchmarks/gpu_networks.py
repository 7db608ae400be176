"""Layers and ResNet-50, dense and SBF, and the tables of their times on a device."""

import gc
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from gpu_problems import name_of, random_features, random_transforms
from torch import Tensor, nn

# Called with a function of no arguments; gives the median milliseconds of a call.
Timer = Callable[[Callable[[], object]], float]


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
    """An SBF layer at about half the multiply-adds of `conv`, with what follows it."""

    def __init__(self, conv: nn.Conv2d, relu: bool, seed: int) -> None:
        super().__init__()
        from sbf_dist.ops import sbf_conv2d

        self.operator = sbf_conv2d
        dense = conv.weight[0].numel()
        # Of C outputs, B cost `dense` and the others nine multiply-adds each.
        basis = conv.out_channels * (dense / 2 - 9) / (dense - 9)
        self.layer = sbf_layer(conv, max(8, 8 * round(basis / 8)), seed=seed)
        self.activation = "relu" if relu else "none"

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
