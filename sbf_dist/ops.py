"""The operator `expand`: rebuilds pruned channels from the channels that are kept.

The kernels are in csrc/, reached as torch.ops.sbf.*; here are the plain PyTorch reference, and what
PyTorch must know of the operators: shapes (fake), gradients, FLOPs.
"""

import math
from typing import Literal, TypedDict, Unpack, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

REBUILD = "pip install --no-build-isolation -e . (in the root of the repository)"

try:
    from sbf_dist import _C
except ImportError as error:
    raise ImportError(
        "the extension sbf_dist._C is missing, or was built against another PyTorch than "
        f"{torch.__version__}: build it with {REBUILD}"
    ) from error


def check_build(built_against: str, running: str) -> None:
    """Raise ImportError unless both PyTorch versions have the same major and minor number."""
    if built_against.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(
            f"the extension sbf_dist._C was built against PyTorch {built_against}, but this is "
            f"PyTorch {running}: rebuild it with {REBUILD}"
        )


check_build(_C.build_info()["torch"], torch.__version__)


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
    return torch.ops.sbf.expand(z, transforms.to(z.dtype), sources, order, bias)


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
        made = F.conv2d(gathered, transforms, padding=(size - 1) // 2, groups=rebuilt)
        z = torch.cat([z, made], dim=1)
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
    "hardswish": F.hardswish,
}


# ---------------------------------------------------------------- shapes


def _like(features: Tensor, shape: tuple) -> Tensor:
    """Give a new tensor of `shape` with the dtype, device and layout of `features`."""
    memory_format = torch._prims_common.suggest_memory_format(features)
    return torch.empty(
        shape, dtype=features.dtype, device=features.device, memory_format=memory_format
    )


@torch.library.register_fake("sbf::expand")
def _(z, transforms, sources, order, bias):
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
def _(x, weight, transforms, sources, order, bias, residual, *settings):
    stride, padding, dilation, groups, _activation, _packed = settings
    z = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return _like(x, (z.shape[0], order.shape[0], *z.shape[2:]))


@torch.library.register_fake("sbf::pack_filters")
def _(weight):
    lanes = _C.build_info()["cpu_lanes"]
    panels = (weight.shape[0] + lanes - 1) // lanes
    return weight.new_empty((panels, math.prod(weight.shape[1:]), lanes))


@torch.library.register_fake("sbf::expand_grad_input")
def _(grad, transforms, sources, order):
    basis = order.shape[0] - sources.shape[0]
    return _like(grad, (grad.shape[0], basis, *grad.shape[2:]))


@torch.library.register_fake("sbf::expand_grad_transforms")
def _(grad, z, sources, order, size):
    return z.new_empty((*sources.shape, size, size))


# ---------------------------------------------------------------- gradients

# expand is linear in z and in transforms, so its gradients are too, and the three operators are
# closed under differentiation: no order of derivative needs another kernel.


def _save_for_expand(ctx, inputs, output):
    z, transforms, sources, order, _ = inputs
    ctx.size = transforms.shape[-1]
    # z is the larger by far: keep it only for transforms that are trained.
    kept_z = z if ctx.needs_input_grad[1] else None
    kept_transforms = transforms if ctx.needs_input_grad[0] else None
    ctx.save_for_backward(kept_z, kept_transforms, sources, order)


def _expand_backward(ctx, grad):
    z, transforms, sources, order = ctx.saved_tensors
    grad_z = grad_transforms = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_z = torch.ops.sbf.expand_grad_input(grad, transforms, sources, order)
    if ctx.needs_input_grad[1]:
        grad_transforms = torch.ops.sbf.expand_grad_transforms(grad, z, sources, order, ctx.size)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_z, grad_transforms, None, None, grad_bias


def _save_for_grad_input(ctx, inputs, output):
    grad, transforms, sources, order = inputs
    ctx.size = transforms.shape[-1]
    ctx.save_for_backward(grad, transforms, sources, order)


def _grad_input_backward(ctx, outer):
    grad, transforms, sources, order = ctx.saved_tensors
    grad_grad = grad_transforms = None
    if ctx.needs_input_grad[0]:
        grad_grad = torch.ops.sbf.expand(outer, transforms, sources, order, None)
    if ctx.needs_input_grad[1]:
        grad_transforms = torch.ops.sbf.expand_grad_transforms(
            grad, outer, sources, order, ctx.size
        )
    return grad_grad, grad_transforms, None, None


def _save_for_grad_transforms(ctx, inputs, output):
    grad, z, sources, order, _ = inputs
    ctx.save_for_backward(grad, z, sources, order)


def _grad_transforms_backward(ctx, outer):
    grad, z, sources, order = ctx.saved_tensors
    # Kept channels have no transforms: nothing flows through them here.
    kept = (order < z.shape[1]).view(1, -1, 1, 1)
    grad_grad = grad_z = None
    if ctx.needs_input_grad[0]:
        through = torch.ops.sbf.expand(z, outer, sources, order, None)
        grad_grad = through.masked_fill(kept, 0)
    if ctx.needs_input_grad[1]:
        grad_z = torch.ops.sbf.expand_grad_input(grad.masked_fill(kept, 0), outer, sources, order)
    return grad_grad, grad_z, None, None, None


torch.library.register_autograd("sbf::expand", _expand_backward, setup_context=_save_for_expand)
torch.library.register_autograd(
    "sbf::expand_grad_input", _grad_input_backward, setup_context=_save_for_grad_input
)
torch.library.register_autograd(
    "sbf::expand_grad_transforms",
    _grad_transforms_backward,
    setup_context=_save_for_grad_transforms,
)


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
