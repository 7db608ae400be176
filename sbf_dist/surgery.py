"""Exchanging modules of a network."""

import copy

import torch
from torch import nn

from sbf_dist.layers import SBFConv2d


def become(module: nn.Module, other: nn.Module) -> None:
    """Turn `module` into `other`, in place, wherever a network holds it.

    Setting an attribute of the parent would leave the old module where it has a second name, or
    stands in a plain list. `other`, whose parts `module` takes over, must not be used afterwards.
    """
    module.__class__ = other.__class__
    module.__dict__.clear()
    module.__dict__.update(other.__dict__)


def with_convolutions(student: nn.Module) -> nn.Module:
    """Return a copy in which convolutions stand for SBF layers (see `to_convolution`).

    Its layers have the names, shapes and filters of the dense network's; its outputs are no use.
    """
    dense = copy.deepcopy(student)
    for layer in list(dense.modules()):
        if isinstance(layer, SBFConv2d):
            become(layer, to_convolution(layer))
    return dense


@torch.no_grad()
def to_convolution(layer: SBFConv2d) -> nn.Conv2d:
    """Return the convolution of an SBF layer's shape with its basis filters, the others zero."""
    weight = layer.basis.weight
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        groups=layer.groups,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        device=weight.device,
        dtype=weight.dtype,
    )
    conv.weight.zero_()
    conv.weight[list(layer.kept)] = weight
    if conv.bias is not None and layer.bias is not None:
        conv.bias.copy_(layer.bias)
    conv.weight.requires_grad_(weight.requires_grad)
    return conv.train(layer.training)
