"""Layers whose filters are too large for the tiles: oneDNN's convolution and another operator."""

import pytest
import torch
from torch import nn

import sbf_dist
from sbf_dist.export.fused import MOST_TILE_WEIGHTS, FusedSBFConv2d, FusedWholeBasis
from sbf_dist.layers import SBFConv2d


class Residual(nn.Module):
    """relu(layer(x) + shortcut), the shortcut x itself or a row of it that broadcasts."""

    def __init__(self, layer: SBFConv2d, row: bool) -> None:
        super().__init__()
        self.layer, self.row = layer, row

    def forward(self, x):
        shortcut = x[:, :, :1] if self.row else x
        return torch.relu(self.layer(x) + shortcut)


def layer(kept: int, sources: int, size: int = 3, channels: int = 256) -> SBFConv2d:
    torch.manual_seed(0)
    rows = [[(i + j) % kept for j in range(sources)] for i in range(channels - kept)]
    built = SBFConv2d(channels, channels, 3, range(kept), rows, size, padding=1)
    nn.init.normal_(built.transforms, std=sources**-0.5)
    return built.eval()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 5, 7), (2, 3, 3)])
@pytest.mark.parametrize("row", [False, True])
def test_large_filters_give_what_the_layer_gives(row, shape, layout):
    network = Residual(layer(kept=240, sources=2), row).eval()
    x = torch.randn(shape[0], 256, *shape[1:]).contiguous(memory_format=layout)
    optimized = sbf_dist.optimize(network)
    (fused,) = (m for m in optimized.modules() if isinstance(m, FusedSBFConv2d))
    assert fused.weight.numel() > MOST_TILE_WEIGHTS
    assert fused.basis is not None and fused.packed is None
    with torch.inference_mode():
        for _ in range(2):  # the first call puts the weights into blocks
            torch.testing.assert_close(optimized(x), network(x), rtol=1e-4, atol=1e-4)


def test_new_weights_of_large_filters_are_taken():
    network = nn.Sequential(layer(kept=240, sources=2))
    optimized = sbf_dist.optimize(network)
    x = torch.randn(1, 256, 4, 4).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        optimized(x)
        state = {
            n: 2 * v if v.is_floating_point() else v for n, v in optimized.state_dict().items()
        }
        optimized.load_state_dict(state)
        with torch.no_grad():
            network[0].basis.weight.mul_(2)
            network[0].transforms.mul_(2)
            network[0].bias.mul_(2)
        torch.testing.assert_close(optimized(x), network(x), rtol=1e-4, atol=1e-4)


def test_small_filters_stay_in_tiles():
    optimized = sbf_dist.optimize(nn.Sequential(layer(kept=20, sources=2, channels=40)))
    (fused,) = (m for m in optimized.modules() if isinstance(m, FusedSBFConv2d))
    assert fused.basis is None and fused.packed is not None


@pytest.mark.parametrize(("kept", "tiles"), [(20, True), (160, False)])
def test_sums_over_a_large_basis_are_a_convolution(kept, tiles):
    network = nn.Sequential(layer(kept=kept, sources=kept, size=1))
    optimized = sbf_dist.optimize(network)
    (fused,) = (m for m in optimized.modules() if isinstance(m, FusedWholeBasis))
    x = torch.randn(1, 256, 3, 3).contiguous(memory_format=torch.channels_last)
    assert (fused.tiles is not None) == tiles
    with torch.inference_mode():
        torch.testing.assert_close(optimized(x), network(x), rtol=1e-4, atol=1e-4)
