"""Derivatives of `expand` and of its gradients, to any order and by torch.func, and vmap.

expand is linear in z and affine in transforms, so its gradients are too, and the three operators
are closed under differentiation: no order of derivative needs another kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import sbf_dist.extension  # noqa: F401  registers the operators


def _is_kept(order: Tensor, basis: int) -> Tensor:
    """Return (1, C, 1, 1): whether a channel is a copy, which does not depend on the transforms."""
    return (order < basis).view(1, -1, 1, 1)


def _is_transforming() -> bool:
    """Tell whether torch.func or forward mode is at work, for which PyTorch has no public question.

    It spares what a function costs more than an operator, 30 µs a call. Where a PyTorch cannot
    answer, the answer is yes, which gives the same results.
    """
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is None or active() or getattr(forward_ad, "_current_level", 0) >= 0


def _call(function: type[torch.autograd.Function], operator: Any, *arguments: Any) -> Tensor:
    """Call the function where it is transformed, else the operator, which graphs can hold.

    torch.library.register_autograd alone gives gradients that torch.func refuses
    (https://docs.pytorch.org/docs/stable/notes/extending.func.html).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not _is_transforming():
        return operator(*arguments)
    return function.apply(*arguments)


def expand(*arguments: Any) -> Tensor:
    """Call torch.ops.sbf.expand, differentiable by torch.func too."""
    return _call(_Expand, torch.ops.sbf.expand, *arguments)


def expand_grad_input(*arguments: Any) -> Tensor:
    """Call torch.ops.sbf.expand_grad_input, differentiable by torch.func too."""
    return _call(_ExpandGradInput, torch.ops.sbf.expand_grad_input, *arguments)


def expand_grad_transforms(*arguments: Any) -> Tensor:
    """Call torch.ops.sbf.expand_grad_transforms, differentiable by torch.func too."""
    return _call(_ExpandGradTransforms, torch.ops.sbf.expand_grad_transforms, *arguments)


class _Expand(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z, transforms, sources, order, bias):
        return torch.ops.sbf.expand(z, transforms, sources, order, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, transforms, sources, order, _ = inputs
        ctx.size = transforms.shape[-1]
        # z is the larger by far: keep it only for transforms that are trained.
        kept_z = z if ctx.needs_input_grad[1] else None
        kept_transforms = transforms if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(kept_z, kept_transforms, sources, order)
        ctx.save_for_forward(z, transforms, sources, order)

    @staticmethod
    def jvp(ctx, z_tangent, transforms_tangent, _sources, _order, bias_tangent):
        z, transforms, sources, order = ctx.saved_tensors
        of_z = expand(z_tangent, transforms, sources, order, bias_tangent)
        of_transforms = expand(z, transforms_tangent, sources, order, None)
        return of_z + of_transforms.masked_fill(_is_kept(order, z.shape[1]), 0)

    @staticmethod
    def backward(ctx, grad):
        z, transforms, sources, order = ctx.saved_tensors
        grad_z = grad_transforms = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_z = expand_grad_input(grad, transforms, sources, order)
        if ctx.needs_input_grad[1]:
            grad_transforms = expand_grad_transforms(grad, z, sources, order, ctx.size)
        if ctx.needs_input_grad[4]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_z, grad_transforms, None, None, grad_bias


class _ExpandGradInput(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad, transforms, sources, order):
        return torch.ops.sbf.expand_grad_input(grad, transforms, sources, order)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, transforms, sources, order = inputs
        ctx.size = transforms.shape[-1]
        ctx.save_for_backward(grad, transforms, sources, order)
        ctx.save_for_forward(grad, transforms, sources, order)

    @staticmethod
    def jvp(ctx, grad_tangent, transforms_tangent, _sources, _order):
        grad, transforms, sources, order = ctx.saved_tensors
        of_grad = expand_grad_input(grad_tangent, transforms, sources, order)
        rebuilt = grad.masked_fill(_is_kept(order, len(order) - len(sources)), 0)
        return of_grad + expand_grad_input(rebuilt, transforms_tangent, sources, order)

    @staticmethod
    def backward(ctx, outer):
        grad, transforms, sources, order = ctx.saved_tensors
        grad_grad = grad_transforms = None
        if ctx.needs_input_grad[0]:
            grad_grad = expand(outer, transforms, sources, order, None)
        if ctx.needs_input_grad[1]:
            grad_transforms = expand_grad_transforms(grad, outer, sources, order, ctx.size)
        return grad_grad, grad_transforms, None, None


class _ExpandGradTransforms(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad, z, sources, order, size):
        return torch.ops.sbf.expand_grad_transforms(grad, z, sources, order, size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, z, sources, order, ctx.size = inputs
        ctx.save_for_backward(grad, z, sources, order)
        ctx.save_for_forward(grad, z, sources, order)

    @staticmethod
    def jvp(ctx, grad_tangent, z_tangent, _sources, _order, _size):
        grad, z, sources, order = ctx.saved_tensors
        of_grad = expand_grad_transforms(grad_tangent, z, sources, order, ctx.size)
        return of_grad + expand_grad_transforms(grad, z_tangent, sources, order, ctx.size)

    @staticmethod
    def backward(ctx, outer):
        grad, z, sources, order = ctx.saved_tensors
        kept = _is_kept(order, z.shape[1])
        grad_grad = grad_z = None
        if ctx.needs_input_grad[0]:
            through = expand(z, outer, sources, order, None)
            grad_grad = through.masked_fill(kept, 0)
        if ctx.needs_input_grad[1]:
            grad_z = expand_grad_input(grad.masked_fill(kept, 0), outer, sources, order)
        return grad_grad, grad_z, None, None, None


for _name, _function in (
    ("expand", _Expand),
    ("expand_grad_input", _ExpandGradInput),
    ("expand_grad_transforms", _ExpandGradTransforms),
):
    torch.library.register_autograd(
        f"sbf::{_name}", _function.backward, setup_context=_function.setup_context
    )


# ---------------------------------------------------------------- vmap

# What an operator maps image by image, its first argument, is one batch of all images where nothing
# else has the new dimension; else there is one call for each entry of it.


def _vmap_by_batch(operator: Callable[..., Tensor]) -> Callable:
    def rule(info, in_dims, features, *rest):
        if any(isinstance(dim, int) for dim in in_dims[1:]):
            return _vmap_by_entry(operator)(info, in_dims, features, *rest)
        stacked = features.movedim(in_dims[0], 0)
        y = operator(stacked.flatten(0, 1), *rest)
        return y.unflatten(0, stacked.shape[:2]), 0

    return rule


def _vmap_by_entry(operator: Callable[..., Tensor]) -> Callable:
    def rule(info, in_dims, *arguments):
        entries = [
            operator(
                *(
                    value.select(dim, entry) if isinstance(dim, int) else value
                    for value, dim in zip(arguments, in_dims, strict=True)
                )
            )
            for entry in range(info.batch_size)
        ]
        return torch.stack(entries), 0

    return rule


torch.library.register_vmap("sbf::expand", _vmap_by_batch(torch.ops.sbf.expand))
torch.library.register_vmap("sbf::conv2d", _vmap_by_batch(torch.ops.sbf.conv2d))
torch.library.register_vmap(
    "sbf::expand_grad_input", _vmap_by_batch(torch.ops.sbf.expand_grad_input)
)
torch.library.register_vmap(
    "sbf::expand_grad_transforms", _vmap_by_entry(torch.ops.sbf.expand_grad_transforms)
)
