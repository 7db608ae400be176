"""Layers whose rebuilt channels read most of the basis with m = 1, as products with a matrix."""

import torch
from torch import Tensor

from sbf_dist.export.unscaled import UnscaledSBFConv2d
from sbf_dist.layers import SBFConv2d


def reads_most_of_basis(layer: SBFConv2d | UnscaledSBFConv2d) -> bool:
    """Whether channels are rebuilt from more than half of the basis, pixel by pixel."""
    rebuilt, sources, m, _ = layer.transforms.shape
    many = sources > 1 and layer.basis.out_channels < 2 * sources
    return rebuilt > 0 and m == 1 and many and getattr(layer, "between", None) is None


def basis_weights(layer: SBFConv2d | UnscaledSBFConv2d) -> Tensor:
    """Return each output channel's weights of the basis features, (C_out, B, 1, 1).

    The row of a kept channel has a one at its own feature.
    """
    num_outputs, num_kept = layer.out_channels, layer.basis.out_channels
    taps = layer.transforms.detach().flatten(1)
    rebuilt = taps.new_zeros(len(taps), num_kept).scatter_add_(1, layer.sources, taps)
    rows = torch.cat([torch.eye(num_kept).to(taps), rebuilt])[layer.order[:num_outputs]]
    return rows[:, :, None, None].contiguous()
