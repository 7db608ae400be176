import pytest
import torch
from compared_networks import images, network
from torch import nn
from torch.nn import functional as F

from sbf_dist.compression.cost import count
from sbf_dist.errors import UserError
from sbf_dist.layers import SBFConv2d
from sbf_dist.peers.ghost import ghost, ghost_module

SHAPE = (3, 16, 16)


def test_a_ghost_module_is_a_convolution_and_a_depthwise_one_of_its_features():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3, padding=1, stride=2)
    module = ghost_module(conv, 4, torch.Generator().manual_seed(0))
    x = torch.randn(2, 6, 9, 9)
    primary = F.conv2d(x, conv.weight[list(module.kept)], stride=2, padding=1)
    sources = [module.kept.index(row[0]) for row in module.rebuilt_from]
    assert sources == [0, 1, 2, 3, 0, 1]
    cheap = F.conv2d(primary[:, sources], module.transforms, padding=1, groups=6)
    others = [c for c in range(10) if c not in module.kept]
    expected = torch.empty(2, 10, 5, 5)
    expected[:, list(module.kept)], expected[:, others] = primary, cheap
    expected += conv.bias[:, None, None]
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_the_largest_filters_are_the_primary_ones():
    conv = nn.Conv2d(4, 6, 3)
    with torch.no_grad():
        conv.weight[[1, 4]] *= 100
    module = ghost_module(conv, 2, torch.Generator())
    assert module.kept == (1, 4)
    assert torch.equal(module.basis.weight, conv.weight[[1, 4]])


@pytest.mark.parametrize(("kind", "share"), [("resnet", 0.5), ("resnet", 0.25), ("vgg", 0.6)])
def test_the_budget_is_used_and_every_layer_has_its_share(kind, share):
    dense = network(kind)
    small = ghost(dense, share, images())
    assert share - 0.01 <= count(small, SHAPE).macs / count(dense, SHAPE).macs <= share
    kept = [len(m.kept) / m.out_channels for m in small.modules() if isinstance(m, SBFConv2d)]
    assert kept
    assert max(kept) - min(kept) < 0.15


def test_cheap_transformations_are_random_and_seeded_and_learn():
    dense = network("vgg")
    one, same, other = (ghost(dense, 0.6, images(), seed=seed) for seed in (0, 0, 1))
    first = [m.transforms for m in one.modules() if isinstance(m, SBFConv2d)]
    again = [m.transforms for m in same.modules() if isinstance(m, SBFConv2d)]
    else_ = [m.transforms for m in other.modules() if isinstance(m, SBFConv2d)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, else_, strict=True))
    one.train()(images()).square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in first)


def test_all_of_the_budget_leaves_the_network_as_it_is():
    dense = network("resnet")
    torch.testing.assert_close(
        ghost(dense, 1.0, images())(images()), dense(images()), rtol=1e-3, atol=1e-4
    )


def test_a_budget_out_of_reach_is_refused():
    with pytest.raises(UserError, match=r"ghost at 0\.1 of the MACs"):
        ghost(network("vgg"), 0.1, images())


def test_a_network_without_such_convolutions_is_refused():
    network_without = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UserError, match="no convolution that a Ghost module could replace"):
        ghost(network_without, 0.5, images())
