"""Layers whose rebuilt channels read most of the basis, pixel by pixel: products with a matrix."""

import torch
from torch import Tensor

from sbf_dist.export.fold import UnscaledSBFConv2d
from sbf_dist.layers import SBFConv2d


def reads_most_of_basis(layer: SBFConv2d | UnscaledSBFConv2d) -> bool:
    """Whether channels are rebuilt from more than half of the basis, and from several, with m = 1.

    It decides the form of an exported layer. From how many sources on a kernel multiplies by a
    matrix is its own affair (csrc/mixture.h).
    """
    rebuilt, sources, m, _ = layer.transforms.shape
    many = sources > 1 and layer.basis.out_channels < 2 * sources
    return rebuilt > 0 and m == 1 and many and getattr(layer, "between", None) is None


def mixing_weight(layer: SBFConv2d | UnscaledSBFConv2d) -> Tensor:
    """Return each output channel's weights of the basis features, (C_out, B, 1, 1)."""
    outputs, kept = layer.out_channels, layer.basis.out_channels
    taps = layer.transforms.detach().flatten(1)
    rebuilt = taps.new_zeros(len(taps), kept).scatter_add_(1, layer.sources, taps)
    rows = torch.cat([torch.eye(kept).to(taps), rebuilt])[layer.order[:outputs]]
    return rows[:, :, None, None].contiguous()
