import pytest
import torch
from compared_networks import images, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sbf_dist.compression.cost import count
from sbf_dist.compression.fitting.statistics import gather_moments
from sbf_dist.errors import UserError
from sbf_dist.peers.low_rank import LowRankConv2d, low_rank, reduced_regression, truncated_svd

SHAPE = (3, 16, 16)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 8),
    st.integers(2, 12),
    st.sampled_from([1, 3, 5]),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_full_rank_is_exact(inputs, outputs, size, stride, bias):
    torch.manual_seed(inputs + 100 * outputs)
    conv = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=bias)
    layer = LowRankConv2d(conv, outputs)
    layer.set(*truncated_svd(conv, outputs))
    x = torch.randn(2, inputs, 9, 9)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)


def of_rank(conv: nn.Conv2d, rank: int, x: torch.Tensor) -> tuple[nn.Module, nn.Module]:
    """The same rank by filters and by responses."""
    filters, responses = LowRankConv2d(conv, rank), LowRankConv2d(conv, rank)
    filters.set(*truncated_svd(conv, rank))
    with torch.no_grad():
        pairs = [(conv._conv_forward(x, conv.weight, None), conv(x))]
        responses.set(*reduced_regression(conv, rank, gather_moments(iter(pairs), 1)))
    return filters, responses


def test_responses_are_kept_better_than_filters_keep_them_and_both_better_with_rank():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 12, 3, padding=1)
    x = images(16).repeat(1, 2, 1, 1) + 1.0
    with torch.no_grad():
        errors = [
            [(layer(x) - conv(x)).square().mean().item() for layer in of_rank(conv, rank, x)]
            for rank in (2, 5, 9)
        ]
    assert all(responses < filters for filters, responses in errors)
    assert errors == sorted(errors, reverse=True)


def test_the_reduced_regression_is_the_best_of_its_rank():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1)
    x = images(8).repeat(1, 2, 1, 1)[:, :4]
    _, layer = of_rank(conv, 2, x)
    with torch.no_grad():
        y = conv(x).transpose(0, 1).flatten(1).double()
        error = (layer(x).transpose(0, 1).flatten(1) - y).square().sum()
        # What no affine map of rank 2 can keep: the smaller singular values of the responses.
        lost = torch.linalg.svdvals(y - y.mean(1, keepdim=True))[2:].square().sum()
    assert error.item() == pytest.approx(lost.item(), rel=1e-3)


@pytest.mark.parametrize("basis", ["filters", "responses"])
@pytest.mark.parametrize(("kind", "share"), [("resnet", 0.5), ("resnet", 0.25), ("vgg", 0.6)])
def test_the_budget_is_used_by_real_convolutions(basis, kind, share):
    dense = network(kind)
    small = low_rank(dense, share, images(), basis=basis)
    assert share - 0.015 <= count(small, SHAPE).macs / count(dense, SHAPE).macs <= share
    assert any(isinstance(module, LowRankConv2d) for module in small.modules())
    small.train()(images()).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_without_training_responses_serve_better_than_filters():
    dense = network("resnet")
    x = images()
    with torch.no_grad():
        errors = {
            basis: (low_rank(dense, 0.5, x, basis=basis)(x) - dense(x)).square().mean().item()
            for basis in ("filters", "responses")
        }
    assert errors["responses"] < errors["filters"]


def test_all_of_the_budget_leaves_the_network_as_it_is():
    dense = network("resnet")
    torch.testing.assert_close(
        low_rank(dense, 1.0, images())(images()), dense(images()), rtol=1e-3, atol=1e-4
    )


def test_a_budget_out_of_reach_is_refused_with_the_smallest():
    with pytest.raises(UserError, match=r"macs = 0.01 .* smallest that works is 0\.\d+"):
        low_rank(network("vgg"), 0.01, images())


def test_a_network_without_such_convolutions_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UserError, match="no convolution that could be factorised"):
        low_rank(network, 0.5, images())
