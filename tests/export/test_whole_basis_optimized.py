"""Channels rebuilt from the whole basis in optimized networks, on maps of a size for either way."""

import pickle

import pytest
import torch
from test_optimize import ACTIVATIONS, check_agreement, kinds
from torch import Tensor, nn

from sbf_dist import _C
from sbf_dist.export.fused import FusedSBFConv2d, FusedWholeBasis
from sbf_dist.export.optimize import optimize
from sbf_dist.export.whole_basis import basis_weights, reads_most_of_basis
from sbf_dist.layers import SBFConv2d


def whole_basis(
    inputs: int = 12, channels: int = 12, *, kept: int = 5, bias: bool = True
) -> SBFConv2d:
    chosen = sorted(torch.randperm(channels)[:kept].tolist())
    sources = [chosen] * (channels - kept)
    layer = SBFConv2d(inputs, channels, 3, chosen, sources, 1, padding=1, bias=bias)
    nn.init.normal_(layer.transforms)
    return layer


class Block(nn.Module):
    """Two such layers with batch norm and activation, the second with a residual."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.first, self.second = whole_basis(), whole_basis(bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(12) for _ in range(2))
        self.act = ACTIVATIONS[activation]()
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.act(self.norms[0](self.first(x)))
        return self.head(self.act(self.norms[1](self.second(y)) + x).mean((2, 3)))


SMALL, LARGE = (9, 7), (120, 90)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_layer_takes_what_follows_it_along(
    size: tuple[int, int], activation: str, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    model = Block(activation)
    x = torch.randn(3, 3, *size)
    model.train()(x)
    optimized = optimize(model.eval())
    found = kinds(optimized)
    assert found[FusedWholeBasis] == found[FusedSBFConv2d] == 2  # the one has the other
    assert not found[SBFConv2d] and not found[nn.BatchNorm2d]
    for batch in (x, x[:1]):
        check_agreement(optimized, model, batch.contiguous(memory_format=layout))
    check_agreement(pickle.loads(pickle.dumps(optimized)), model, x)


@pytest.mark.parametrize(("size", "operators"), [(SMALL, 1), (LARGE, 2)])
def test_a_small_product_is_one_operator_and_a_large_one_two(
    size: tuple[int, int], operators: int
) -> None:
    x = torch.randn(3, 12, *size)
    fused = FusedWholeBasis(whole_basis().eval(), "relu")
    assert (3 * size[0] * size[1] * 12 * 5 <= _C.MAX_TILE_MULTIPLY_ADDS) == (operators == 1)
    with torch.profiler.profile() as profile, torch.no_grad():
        fused(x.contiguous(memory_format=torch.channels_last))
    names = [event.name for event in profile.events()]
    assert names.count("sbf::conv2d") == 2 - operators
    assert names.count("mkldnn::_convolution_pointwise") == 2 * (operators - 1)


def test_the_model_is_not_changed_by_running_its_optimized_copy() -> None:
    torch.manual_seed(0)
    model = Block("relu").eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    check_agreement(optimize(model), model, torch.randn(2, 3, 6, 6))
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_the_matrix_is_what_the_layer_does_to_each_pixel() -> None:
    torch.manual_seed(0)
    layer = whole_basis().eval()
    x = torch.randn(2, 12, 5, 4)
    with torch.no_grad():
        expected = nn.functional.conv2d(layer.basis(x), basis_weights(layer), layer.bias)
        torch.testing.assert_close(layer(x), expected)


def test_few_sources_or_neighbours_make_no_whole_basis() -> None:
    conv = nn.Conv2d(3, 6, 3)
    assert reads_most_of_basis(SBFConv2d.from_conv(conv, [0, 2], [[0, 2]] * 4, 1))
    assert not reads_most_of_basis(SBFConv2d.from_conv(conv, [0, 2], [[0]] * 4, 1))
    assert not reads_most_of_basis(SBFConv2d.from_conv(conv, [0, 2, 3, 5], [[0, 2]] * 2, 1))
    assert not reads_most_of_basis(SBFConv2d.from_conv(conv, [0, 2], [[0, 2]] * 4, 3))
    assert not reads_most_of_basis(SBFConv2d.from_conv(conv, range(6), [], 1))
