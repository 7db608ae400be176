"""Layers whose rebuilt channels are mixtures of most of the basis, as products with a matrix."""

import torch
from torch import Tensor

from sbf_dist.export.fold import UnscaledSBFConv2d
from sbf_dist.layers import SBFConv2d


def is_mixture(layer: SBFConv2d | UnscaledSBFConv2d) -> bool:
    """Tell whether channels are rebuilt from more than half of the basis, pixel by pixel."""
    rebuilt, sources, m, _ = layer.transforms.shape
    many = sources > 1 and layer.basis.out_channels < 2 * sources
    return rebuilt > 0 and m == 1 and many and getattr(layer, "between", None) is None


def mixing_weight(layer: SBFConv2d | UnscaledSBFConv2d) -> Tensor:
    """Return what each output channel is made of, (C_out, B, 1, 1); kept ones of themselves."""
    outputs, kept = layer.out_channels, layer.basis.out_channels
    taps = layer.transforms.detach().flatten(1)
    made = taps.new_zeros(len(taps), kept).scatter_add_(1, layer.sources, taps)
    rows = torch.cat([torch.eye(kept).to(taps), made])[layer.order[:outputs]]
    return rows[:, :, None, None].contiguous()
