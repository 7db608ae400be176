"""The operator `expand`: rebuilds pruned channels from the channels that are kept.

The kernels are in csrc/, reached as torch.ops.sbf.*; here are the plain PyTorch reference, and what
PyTorch must know of the operators: shapes (fake) and FLOPs. Gradients are in ops_gradients.py.
"""

import math
from typing import Literal, TypedDict, Unpack, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sbf_dist import ops_gradients
from sbf_dist.extension import build_info


def expand(
    z: Tensor, transforms: Tensor, sources: Tensor, order: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Rebuild channels from basis features and put all in their original order.

    Entry b < B is z[:, b] itself; entry B + p is the sum over s of z[:, sources[p, s]]
    cross-correlated with transforms[p, s], stride 1, zero padding (m - 1) / 2. Output channel c is
    entry order[c], plus bias[c].

    z: (N, B, H, W) on the CPU or a CUDA device; transforms: (P, S, m, m), m odd; sources: int64
    (P, S), positions in [0, B); order: int64 (B + P,), a permutation; bias: (B + P,) or None.
    Returns (N, B + P, H, W) in z's dtype and memory format; transforms and bias are cast to z's
    dtype, and sums of half and bfloat16 are accumulated in float. Differentiable, to any order, in
    z, transforms and bias. Raises RuntimeError, naming the argument, where these do not fit
    (CUDA cannot report the values in sources and order so: there they trip a device assertion), and
    NotImplementedError for CUDA tensors if the extension was built without CUDA.
    """
    if bias is not None:
        bias = bias.to(z.dtype)
    return ops_gradients.expand(z, transforms.to(z.dtype), sources, order, bias)


def expand_reference(
    z: Tensor, transforms: Tensor, sources: Tensor, order: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute what `expand` does with PyTorch's own operators; same arguments and result.

    Half and bfloat16 are rounded between the steps, where `expand` rounds once.
    """
    rebuilt, per_channel, size, _ = transforms.shape
    transforms = transforms.to(z.dtype)
    if rebuilt > 0:
        # One group per rebuilt channel: it sees its own S sources.
        gathered = z[:, sources.flatten()]
        assert gathered.shape[1] == rebuilt * per_channel
        rebuilt_channels = F.conv2d(gathered, transforms, padding=(size - 1) // 2, groups=rebuilt)
        z = torch.cat([z, rebuilt_channels], dim=1)
    y = z[:, order]
    if bias is not None:
        y = y + bias.to(y.dtype).view(1, -1, 1, 1)
    return y


Activation = Literal["none", "relu", "relu6", "silu", "hardswish"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
Pair = tuple[int, int]


class BasisKeywords(TypedDict, total=False):
    """How the basis filters are applied.

    stride, padding, dilation, groups: those of F.conv2d, with its defaults, but for both axes.
    packed: pack_filters(weight), which spares packing them at each call on the CPU in float32;
    elsewhere it is not used.
    """

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    packed: Tensor | None


def _geometry(basis: BasisKeywords) -> tuple[Pair, Pair, Pair, int]:
    """Return stride, padding, dilation and groups, with their defaults."""
    return (
        basis.get("stride", (1, 1)),
        basis.get("padding", (0, 0)),
        basis.get("dilation", (1, 1)),
        basis.get("groups", 1),
    )


def sbf_conv2d(
    x: Tensor,
    weight: Tensor,
    transforms: Tensor,
    sources: Tensor,
    order: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = "none",
    **basis: Unpack[BasisKeywords],
) -> Tensor:
    """Compute activation(expand(convolution of x) + bias + residual) in one operator.

    For inference: it has no gradient. x: (N, C_in, H, W); weight: (B, C_in / groups, k_h, k_w), the
    basis filters; transforms, sources, order, bias: as for `expand`; residual: (N, B + P, H', W').
    All have x's dtype (float32, float64, float16 or bfloat16) and device, and the sums of half and
    bfloat16 are accumulated in float. basis: see BasisKeywords. Returns (N, B + P, H', W') in x's
    memory format. Raises RuntimeError, naming the argument, where these do not fit.
    """
    return torch.ops.sbf.conv2d(
        x,
        weight,
        transforms,
        sources,
        order,
        bias,
        residual,
        *_geometry(basis),
        activation,
        basis.get("packed"),
    )


def pack_filters(weight: Tensor) -> Tensor:
    """Put float32 filters (B, C_in, k_h, k_w) in the order in which this CPU's kernels read them.

    The result depends on the CPU's instruction set: make it where it is used, and do not store it.
    """
    return torch.ops.sbf.pack_filters(weight)


def sbf_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    transforms: Tensor,
    sources: Tensor,
    order: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = "none",
    **basis: Unpack[BasisKeywords],
) -> Tensor:
    """Compute what `sbf_conv2d` does with PyTorch's own operators; same arguments and result."""
    stride, padding, dilation, groups = _geometry(basis)
    z = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    y = expand_reference(z, transforms, sources, order, bias)
    if residual is not None:
        y = y + residual
    return _ACTIVATION_OF[activation](y)


_ACTIVATION_OF = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    # F.hardswish multiplies by a float's 1/6 on CUDA, in double too.
    "hardswish": lambda y: y * F.relu6(y + 3) / 6,
}


# ---------------------------------------------------------------- shapes


def _like(features: Tensor, shape: tuple) -> Tensor:
    """Give a new tensor of `shape` with the dtype, device and layout of `features`."""
    memory_format = torch._prims_common.suggest_memory_format(features)
    return torch.empty(
        shape, dtype=features.dtype, device=features.device, memory_format=memory_format
    )


def _check_devices(**tensors: Tensor | None) -> None:
    """Raise RuntimeError, naming the argument, unless all tensors are on the first one's device.

    Calls with one tensor on the meta device come here too, and would return memory as it is.
    """
    (first, expected), *others = ((n, t.device) for n, t in tensors.items() if t is not None)
    for name, device in others:
        if device != expected:
            raise RuntimeError(f"{name} must be on the device of {first}, {expected}, got {device}")


@torch.library.register_fake("sbf::expand")
def _(z, transforms, sources, order, bias):
    _check_devices(z=z, transforms=transforms, sources=sources, order=order, bias=bias)
    torch._check(
        z.dim() == 4 and transforms.dim() == 4,
        lambda: f"z and transforms must have 4 dimensions, got {z.shape} and {transforms.shape}",
    )
    torch._check(
        z.shape[1] + sources.shape[0] == order.shape[0],
        lambda: (
            f"order must have length B + P = {z.shape[1] + sources.shape[0]} "
            f"(z has B = {z.shape[1]} channels, sources P = {sources.shape[0]} rows), "
            f"got {order.shape[0]}"
        ),
    )
    return _like(z, (z.shape[0], order.shape[0], *z.shape[2:]))


@torch.library.register_fake("sbf::conv2d")
def _(
    x,
    weight,
    transforms,
    sources,
    order,
    bias,
    residual,
    stride,
    padding,
    dilation,
    groups,
    activation,
    packed,
):
    _check_devices(
        x=x,
        weight=weight,
        transforms=transforms,
        sources=sources,
        order=order,
        bias=bias,
        residual=residual,
        packed=packed,
    )
    z = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return _like(x, (z.shape[0], order.shape[0], *z.shape[2:]))


@torch.library.register_fake("sbf::pack_filters")
def _(weight):
    lanes = build_info()["cpu_lanes"]
    panels = (weight.shape[0] + lanes - 1) // lanes
    return weight.new_empty((panels, math.prod(weight.shape[1:]), lanes))


@torch.library.register_fake("sbf::expand_grad_input")
def _(grad, transforms, sources, order):
    _check_devices(grad=grad, transforms=transforms, sources=sources, order=order)
    basis = order.shape[0] - sources.shape[0]
    return _like(grad, (grad.shape[0], basis, *grad.shape[2:]))


@torch.library.register_fake("sbf::expand_grad_transforms")
def _(grad, z, sources, order, size):
    _check_devices(z=z, grad=grad, sources=sources, order=order)
    return z.new_empty((*sources.shape, size, size))


# ---------------------------------------------------------------- FLOPs: 2 per multiply-add


@register_flop_formula(torch.ops.sbf.expand)
def _(z_shape, transforms_shape, *args, **kwargs) -> int:
    n, _, h, w = z_shape
    p, s, m, _ = transforms_shape
    return 2 * n * h * w * p * s * m * m


@register_flop_formula(torch.ops.sbf.conv2d)
def _(x_shape, weight_shape, transforms_shape, *args, out_shape, **kwargs) -> int:
    n, _, h, w = out_shape
    p, s, m, _ = transforms_shape
    per_pixel = math.prod(weight_shape) + p * s * m * m
    return 2 * n * h * w * per_pixel


@register_flop_formula(torch.ops.sbf.expand_grad_input)
def _(grad_shape, transforms_shape, *args, **kwargs) -> int:
    n, _, h, w = grad_shape
    p, s, m, _ = transforms_shape
    return 2 * n * h * w * p * s * m * m


@register_flop_formula(torch.ops.sbf.expand_grad_transforms)
def _(grad_shape, z_shape, sources_shape, order_shape, size, **kwargs) -> int:
    n, _, h, w = grad_shape
    p, s = sources_shape
    return 2 * n * h * w * p * s * size * size
