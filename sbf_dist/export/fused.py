"""Convolutions with bias, residual and activation in one operator, for inference."""

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist import _C
from sbf_dist.export.unscaled import UnscaledSBFConv2d
from sbf_dist.export.whole_basis import basis_weights
from sbf_dist.layers import SBFConv2d, is_recorded
from sbf_dist.ops import Activation, Pair, expand, pack_filters, sbf_conv2d
from sbf_dist.padding import pad_of

# What oneDNN's fused convolution calls our activations: name, and its scalars.
ONEDNN_UNARY: dict[Activation, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
    "hardswish": ("hardswish", []),
}

# Filters of more numbers than these do not stay in the cache of a core, and tiles read all of them
# again and again: oneDNN's convolution of the basis and another operator are faster then, up to
# twice (docs/kernels.md). A product with the whole basis is cheap beside oneDNN's: from fewer on.
MOST_TILE_WEIGHTS = 1 << 19
MOST_TILE_WEIGHTS_OF_WHOLE_BASIS = 3 << 16


class FusedSBFConv2d(nn.Module):
    """activation(SBF layer + bias + residual) by `sbf_dist.ops.sbf_conv2d`; no gradients.

    It shares the parameters of the folded layer that it comes from; the filters of a float32 layer
    on the CPU are packed once, so they count as constant until `pack` or load_state_dict. A
    residual that has not exactly the output's shape and dtype is added by broadcasting, after the
    operator. Where the filters are large, on a CPU, the basis features come from oneDNN's
    convolution (`basis`), with weights that are put into blocks once.
    """

    sources: Tensor
    order: Tensor
    packed: Tensor | None

    def __init__(self, layer: SBFConv2d | UnscaledSBFConv2d, activation: Activation) -> None:
        super().__init__()
        padding = numeric_padding(layer.basis)
        if padding is None:
            raise ValueError(
                f"{type(layer).__name__} has padding {layer.basis.padding!r} and padding_mode "
                f"{layer.basis.padding_mode!r}: only symmetric padding with zeros can be fused"
            )
        self.pad = pad_of(layer.basis)
        self.weight = layer.basis.weight
        self.transforms = layer.transforms
        self.bias = layer.bias
        self.register_buffer("sources", layer.sources, persistent=False)
        self.register_buffer("order", layer.order, persistent=False)
        self.out_channels = layer.out_channels
        self.hidden = len(layer.order) - layer.out_channels  # basis features that are cut off
        self.stride, self.dilation = _pair(layer.basis.stride), _pair(layer.basis.dilation)
        self.padding = padding
        self.groups = layer.basis.groups
        self.activation = activation
        is_large = self.weight.numel() > MOST_TILE_WEIGHTS and self.weight[0, 0].numel() > 1
        self.basis = FusedConv2d(layer.basis, "none") if is_large else None
        self.register_buffer("packed", None, persistent=False)
        self.pack()
        self.register_load_state_dict_post_hook(_pack_loaded)

    def pack(self) -> None:
        """Pack the filters anew: after they were changed."""
        packable = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32
        packable = packable and self.groups == 1 and self.basis is None
        self.packed = pack_filters(self.weight.detach()) if packable else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map (N, C_in, H, W), and a residual that broadcasts to the output, to the output."""
        if self.basis is not None and self.basis.onednn_takes(x):
            return self._by_two_operators(self.basis(x), residual)
        x = x if self.pad is None else self.pad(x)
        outside = None  # what is added after the operator
        if residual is not None and not self._adds_inside(residual, x):
            residual, outside = None, residual
        activation = self.activation if outside is None else "none"
        y = sbf_conv2d(
            x,
            self.weight,
            self.transforms,
            self.sources,
            self.order,
            self.bias,
            residual,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            activation=activation,
            packed=self.packed if x.dtype == torch.float32 else None,
        )
        if self.hidden:
            y = y[:, : self.out_channels]
        return y if outside is None else activate(y + outside, self.activation)

    def _by_two_operators(self, z: Tensor, residual: Tensor | None) -> Tensor:
        y = expand(z, self.transforms, self.sources, self.order, self.bias)
        if self.hidden:
            y = y[:, : self.out_channels]
        return activate(y if residual is None else y + residual, self.activation)

    def _adds_inside(self, residual: Tensor, x: Tensor) -> bool:
        if self.hidden or is_recorded():
            return False
        shape = _output_shape(self, self.out_channels, self.weight, x)
        return residual.dtype == x.dtype and tuple(residual.shape) == shape

    def extra_repr(self) -> str:
        """Return the shape, and what is fused."""
        basis, inputs, *size = self.weight.shape
        return (
            f"{inputs * self.groups}, {self.out_channels}, kept={basis}, "
            f"kernel_size={tuple(size)}, sources={self.sources.shape[1]}, "
            f"activation={self.activation}"
        )


def _pack_loaded(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, FusedSBFConv2d)
    layer.pack()


class FusedConv2d(nn.Module):
    """activation(nn.Conv2d + residual), on the CPU by oneDNN's fused convolution; no gradients.

    oneDNN wants its weights in blocks, and nn.Conv2d reorders them into blocks in every call. Here
    the first call does it once, for the shape of its input (another shape gives the right result,
    but may be slower); the weights count as constant from then on, until load_state_dict. In graphs
    (torch.compile, export, jit.trace), on other devices and for other dtypes than float32 it runs
    as the plain operators, which compilers fuse themselves.

    overwrites_residual: whether nothing reads the residual afterwards, so that the output may take
    its memory. Writing elsewhere costs a widening 1 x 1 layer up to a third of its time.
    keeps_layout: whether the output is contiguous where the input is, as nn.Conv2d's; else it is
    in channels_last.
    """

    overwrites_residual = False
    keeps_layout = False

    def __init__(self, conv: nn.Conv2d, activation: Activation) -> None:
        super().__init__()
        padding = numeric_padding(conv)
        if padding is None:
            raise ValueError(
                f"Conv2d has padding {conv.padding!r} and padding_mode {conv.padding_mode!r}: "
                "only symmetric padding with zeros can be fused"
            )
        self.pad = pad_of(conv)
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.dilation = _pair(conv.stride), _pair(conv.dilation)
        self.padding = padding
        self.groups = conv.groups
        self.activation = activation
        self._blocked: Tensor | None = None
        self.register_load_state_dict_post_hook(_forget_blocks)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map (N, C_in, H, W), and a residual that broadcasts to the output, to the output."""
        x = x if self.pad is None else self.pad(x)
        if not self.onednn_takes(x):
            y = F.conv2d(
                x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
            )
            return activate(y if residual is None else y + residual, self.activation)
        if self.keeps_layout and x.is_contiguous():
            return self._by_onednn(x, residual).contiguous()
        return self._by_onednn(x, residual)

    def _by_onednn(self, x: Tensor, residual: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if self._blocked is None:
            self._blocked = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self.padding, self.stride, self.dilation, self.groups, list(x.shape)
            )
        shape = (self.padding, self.stride, self.dilation, self.groups)
        inside = residual is not None and self._is_like_output(residual, x)
        if inside and self.activation in ("none", "relu"):
            unary = None if self.activation == "none" else "relu"
            if self.overwrites_residual:
                return torch.ops.mkldnn._convolution_pointwise_.binary(
                    residual, x, self._blocked, self.bias, *shape, "add", 1.0, unary, [], None
                )
            return torch.ops.mkldnn._convolution_pointwise.binary(
                x, residual, self._blocked, self.bias, *shape, "add", 1.0, unary, [], None
            )
        name, scalars = ONEDNN_UNARY["none" if residual is not None else self.activation]
        y = torch.ops.mkldnn._convolution_pointwise(
            x, self._blocked, self.bias, *shape, name, scalars, ""
        )
        return y if residual is None else activate(y + residual, self.activation)

    def onednn_takes(self, x: Tensor) -> bool:
        """Whether oneDNN's fused convolution is called for such an input."""
        return (
            not torch.compiler.is_compiling()
            and not is_recorded()
            and x.device.type == "cpu"
            and x.dim() == 4
            and x.dtype == self.weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and bool(torch.backends.mkldnn.enabled)
        )

    def _is_like_output(self, residual: Tensor, x: Tensor) -> bool:
        shape = _output_shape(self, len(self.weight), self.weight, x)
        return (
            residual.dtype == x.dtype
            and tuple(residual.shape) == shape
            and residual.is_contiguous(memory_format=torch.channels_last)
        )

    def _apply(self, fn, recurse: bool = True) -> Self:  # .to(), .half(), .cuda()
        self._blocked = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_blocked": None}  # oneDNN's blocks cannot be pickled

    def extra_repr(self) -> str:
        """Return the shape, and what is fused."""
        outputs, inputs, *size = self.weight.shape
        return (
            f"{inputs * self.groups}, {outputs}, kernel_size={tuple(size)}, "
            f"activation={self.activation}"
        )


class FusedWholeBasis(nn.Module):
    """activation(SBF layer + bias + residual) of channels from the whole basis, the faster way.

    Where the product with the basis features is small, on a CPU, one operator (`tiles`, a
    FusedSBFConv2d; None where the filters are large); else two convolutions, `basis` and the 1 x 1
    `product`, each by oneDNN with weights that are put into blocks once.
    """

    def __init__(self, layer: SBFConv2d | UnscaledSBFConv2d, activation: Activation) -> None:
        super().__init__()
        is_large = layer.basis.weight.numel() > MOST_TILE_WEIGHTS_OF_WHOLE_BASIS
        self.tiles = None if is_large else FusedSBFConv2d(layer, activation)
        self.basis = FusedConv2d(layer.basis, "none")
        weight = basis_weights(layer)
        product = nn.utils.skip_init(
            nn.Conv2d, weight.shape[1], weight.shape[0], 1, bias=layer.bias is not None
        )
        product.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            bias = layer.bias.detach()[: layer.out_channels].clone()
            product.bias = nn.Parameter(bias, requires_grad=False)
        self.product = FusedConv2d(product, activation)
        # Of the input, so that a call costs one product: borders do not matter here.
        self.most_pixels = (
            _C.MAX_TILE_MULTIPLY_ADDS * math.prod(self.basis.stride) // weight.numel()
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map (N, C_in, H, W), and a residual that broadcasts to the output, to the output."""
        if self.tiles is not None and self._is_small(x, self.tiles):
            return self.tiles(x, residual)
        return self.product(self.basis(x), residual)

    def _is_small(self, x: Tensor, tiles: FusedSBFConv2d) -> bool:
        if is_recorded() or tiles.packed is None or x.dtype != torch.float32:
            return False
        batch, _, height, width = x.shape
        return batch * height * width <= self.most_pixels


def _forget_blocks(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, FusedConv2d)
    layer._blocked = None


def activate(y: Tensor, activation: Activation) -> Tensor:
    """Apply an activation to a tensor that nothing else reads: it may be overwritten."""
    match activation:
        case "none":
            return y
        case "relu":
            return torch.relu_(y)
        case "relu6":
            return y.clamp_(0, 6)
        case "silu":
            return F.silu(y, inplace=True)
        case "hardswish":
            return F.hardswish(y, inplace=True)


def numeric_padding(conv: nn.Conv2d) -> Pair | None:
    """Return the zeros that `conv` adds on either side of each axis.

    None for other padding modes, and for "same" where the two sides differ.
    """
    if conv.padding_mode != "zeros":
        return None
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    return _pair(conv.padding)  # type: ignore[arg-type]


def _pair(value: tuple[int, ...]) -> Pair:
    first, second = value
    return first, second


def _output_shape(
    layer: FusedSBFConv2d | FusedConv2d, channels: int, weight: Tensor, x: Tensor
) -> tuple[int, ...]:
    sizes = zip(
        x.shape[2:], weight.shape[2:], layer.stride, layer.padding, layer.dilation, strict=True
    )
    return (
        x.shape[0],
        channels,
        *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes),
    )
