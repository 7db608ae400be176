"""SBF layers written with operators that every runtime has, in the forms that run fastest.

Which form is chosen for which layer, and the measurements behind it: docs/kernels-onnx.md.
"""

import logging
from collections import Counter

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sbf_dist.export.tracing import UntraceableError, traced
from sbf_dist.export.unscaled import UnscaledSBFConv2d
from sbf_dist.export.whole_basis import basis_weights, reads_most_of_basis
from sbf_dist.hooks import is_altered, take_hooks
from sbf_dist.layers import SBFConv2d
from sbf_dist.padding import PaddedConv2d
from sbf_dist.surgery import become, deep_copy

logger = logging.getLogger(__name__)

SBF = SBFConv2d | UnscaledSBFConv2d

# They treat each channel alone, and all alike: the order of channels passes through them.
CHANNELWISE_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Hardswish,
    nn.GELU,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)
CHANNELWISE_FUNCTIONS = (F.relu, F.relu_, torch.relu, F.relu6, F.silu, F.hardswish, F.gelu)
CHANNELWISE_METHODS = ("relu", "relu_")


class DepthwiseExpand(nn.Module):
    """An SBF layer as S depthwise convolutions over gathered basis features.

    Slot s of every output channel reads its s-th source; a kept channel is a centre tap of one in
    slot 0, so nothing is concatenated or reordered, and the bias belongs to slot 0. Equals the
    layer, with S (C_out m²) instead of S (P m²) multiply-adds per pixel for expand.
    """

    sources: Tensor

    def __init__(self, layer: SBF) -> None:
        super().__init__()
        self.basis = layer.basis
        outputs = layer.out_channels
        entries = layer.order[:outputs]
        kept = layer.basis.out_channels
        _, slots, m, _ = layer.transforms.shape
        centre_taps = layer.transforms.new_zeros(kept, slots, m, m)
        centre_taps[:, 0, m // 2, m // 2] = 1
        own = torch.arange(kept, device=entries.device)[:, None].expand(-1, slots)
        self.weight = _constant(torch.cat([centre_taps, layer.transforms])[entries])
        self.register_buffer("sources", torch.cat([own, layer.sources])[entries])
        self.bias = None if layer.bias is None else _constant(layer.bias[:outputs])

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H', W')."""
        return _depthwise(self.basis(input), self.weight, self.sources, self.bias)


class ConcatExpand(nn.Module):
    """An SBF layer as its basis features beside the rebuilt channels, which alone are computed.

    With `in_order`, channels are then gathered into their original order; without, they come kept
    ones first, for readers whose weights were permuted to fit. Rebuilt channels read basis features
    without bias, so that kept channels get theirs by a depthwise 1 x 1 convolution: runtimes that
    keep channels in blocks have no other fast operator for it.
    """

    sources: Tensor
    order: Tensor | None

    def __init__(self, layer: SBF, *, in_order: bool) -> None:
        super().__init__()
        self.basis = layer.basis
        self.between = _between(layer)
        self.weight = _constant(layer.transforms)
        self.register_buffer("sources", layer.sources)
        self.register_buffer("order", layer.order[: layer.out_channels] if in_order else None)
        self.kept_bias: Tensor | None = None
        self.rebuilt_bias: Tensor | None = None
        if layer.bias is not None:
            kept = layer.basis.out_channels
            by_entry = layer.bias.detach()[layer.order.argsort()]
            self.kept_bias = _constant(by_entry[:kept])
            self.rebuilt_bias = _constant(by_entry[kept:])
            self.one = _constant(layer.transforms.new_ones(kept, 1, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H', W')."""
        z = self.basis(input)
        features = z if self.between is None else self.between(z)
        rebuilt = _depthwise(features, self.weight, self.sources, self.rebuilt_bias)
        kept = z
        if self.kept_bias is not None:
            kept = F.conv2d(z, self.one, self.kept_bias, groups=len(self.one))
        y = torch.cat([kept, rebuilt], dim=1)
        return y if self.order is None else y.index_select(1, self.order)


class ProductExpand(nn.Module):
    """An SBF layer of m = 1 as its basis and a 1 x 1 convolution of the basis features.

    For layers that read most of the basis, for which the other forms would need as many operators
    as there are sources. Kept channels are a one in their row: C_out B instead of P S multiply-adds
    per pixel, in the operator that runtimes are fastest at.
    """

    def __init__(self, layer: SBF) -> None:
        super().__init__()
        self.basis = layer.basis
        self.weight = _constant(basis_weights(layer))
        self.bias = None if layer.bias is None else _constant(layer.bias[: layer.out_channels])

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H', W')."""
        return F.conv2d(self.basis(input), self.weight, self.bias)


def with_standard_operators(
    model: nn.Module, inputs: tuple[Tensor, ...] | None = None
) -> nn.Module:
    """Return a copy of `model`, which is folded, with its SBF layers in standard operators.

    A layer of one source per channel becomes a `DepthwiseExpand`; so does one of S whose kept
    channels, S times, are no more than all. The others, and those with something between basis and
    transformations (which keep their order), become a `ConcatExpand`, which leaves the
    order of channels free where all that reads it are convolutions, and these are permuted instead.
    Layers that read most of the basis become a `ProductExpand`.

    inputs: an example of what the network is called with; see `sbf_dist.export.tracing.traced`.
    """
    portable = deep_copy(model)
    layers = {name: layer for name, layer in portable.named_modules() if isinstance(layer, SBF)}
    several = {
        name: layer
        for name, layer in layers.items()
        if layer.sources.numel()
        and layer.sources.shape[1] > 1
        and _between(layer) is None
        and not reads_most_of_basis(layer)
        and not is_altered(layer)
    }
    free = _absorb_orders(portable, several, inputs) if several else set()
    for name, layer in layers.items():
        if "forward" in vars(layer):
            continue
        form: nn.Module
        if reads_most_of_basis(layer):
            form = ProductExpand(layer)
        elif name in free:
            form = ConcatExpand(layer, in_order=False)
        elif _between(layer) is not None or (name in several and _is_wide(layer)):
            form = ConcatExpand(layer, in_order=True)
        else:
            form = DepthwiseExpand(layer)
        take_hooks(form, layer)
        become(layer, form)
    return portable


def _is_wide(layer: SBF) -> bool:
    """Whether the kept channels, S times, are more than all."""
    return layer.sources.shape[1] * layer.basis.out_channels > len(layer.order)


def _between(layer: SBF) -> nn.Module | None:
    return layer.between if isinstance(layer, SBFConv2d) else None


def _depthwise(z: Tensor, weight: Tensor, sources: Tensor, bias: Tensor | None) -> Tensor:
    """Sum, over S slots, depthwise convolutions (C, S, m, m) of z's channels `sources` (C, S)."""
    channels, slots, m, _ = weight.shape
    y = None
    for slot in range(slots):
        part = F.conv2d(
            z.index_select(1, sources[:, slot]),  # in ONNX one Gather; indexing would be three
            weight[:, slot : slot + 1],
            bias if slot == 0 else None,
            padding=m // 2,
            groups=channels,
        )
        y = part if y is None else y + part
    assert y is not None
    return y


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


# ---------------------------------------------------------------- orders


def _absorb_orders(
    model: nn.Module, layers: dict[str, SBF], inputs: tuple[Tensor, ...] | None
) -> set[str]:
    """Permute, in place, the convolutions that read layers whose order can be left free.

    Returns the names of those layers.
    """
    try:
        graph = traced(model, inputs)
    except UntraceableError as error:
        logger.warning(
            "channels are gathered into their original order after each layer: %s cannot be "
            "traced by torch.fx (%s)",
            type(model).__name__,
            error,
        )
        return set()
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    reads = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    once = {
        name
        for name, count in calls.items()
        if count == 1 and not any(read.startswith(f"{name}.") for read in reads)
    }
    free = set()
    for node in graph.nodes:
        name = str(node.target)
        if node.op != "call_module" or name not in layers or name not in once:
            continue
        layer = layers[name]
        readers = _readers(node, model, once)
        if readers is None or layer.out_channels != len(layer.order):
            continue
        for reader in readers:
            _permute(reader, layer.order.argsort())
        free.add(name)
    return free


def _readers(node: fx.Node, model: nn.Module, once: set[str]) -> list[nn.Conv2d] | None:
    """Return all convolutions that read `node`; None if something else reads it."""
    found: list[nn.Conv2d] = []
    waiting = [node]
    while waiting:
        for reader in waiting.pop().users:
            if len(reader.all_input_nodes) != 1:
                return None
            if _is_channelwise(reader, model):
                waiting.append(reader)
                continue
            conv = _convolution(reader, model) if str(reader.target) in once else None
            if conv is None:
                return None
            found.append(conv)
            if _is_depthwise(conv):
                waiting.append(reader)
    return found


def _is_channelwise(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return type(module) in CHANNELWISE_MODULES and not is_altered(module)
    if node.op == "call_function":
        return node.target in CHANNELWISE_FUNCTIONS
    return node.op == "call_method" and node.target in CHANNELWISE_METHODS


def _convolution(node: fx.Node, model: nn.Module) -> nn.Conv2d | None:
    """Return the convolution, or basis of an SBF layer, at `node` if its input can be permuted."""
    if node.op != "call_module":
        return None
    module = model.get_submodule(str(node.target))
    if any(map(is_altered, module.modules())):  # a hook may compute the weights, or read channels
        return None
    if isinstance(module, SBF):
        return module.basis if module.basis.groups == 1 else None
    if not isinstance(module, nn.Conv2d) or type(module) not in (nn.Conv2d, PaddedConv2d):
        return None
    return module if module.groups == 1 or _is_depthwise(module) else None


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels


def _permute(conv: nn.Conv2d, order: Tensor) -> None:
    """Give `conv` its input channels in another order: channel i is what was channel order[i]."""
    weight = conv.weight.detach()
    if not _is_depthwise(conv):
        conv.weight = _constant(weight[:, order])
        return
    conv.weight = _constant(weight[order])
    if conv.bias is not None:
        conv.bias = _constant(conv.bias[order])
