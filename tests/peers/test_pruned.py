import copy

import pytest
import torch
import torch_pruning as tp
from compared_networks import images, network
from torch import nn

from sbf_dist.compression.cost import count
from sbf_dist.errors import UserError
from sbf_dist.peers.pruned import prune

SHAPE = (3, 16, 16)


def share_of(small: nn.Module, dense: nn.Module) -> float:
    return count(small, SHAPE).macs / count(dense, SHAPE).macs


@pytest.mark.parametrize("everywhere", [False, True], ids=["uniform", "global"])
@pytest.mark.parametrize("importance", ["l1", "depgraph"])
def test_channels_are_cut_off_and_the_budget_is_used(importance, everywhere):
    dense = network("resnet")
    small = prune(dense, 0.5, images(), importance=importance, everywhere=everywhere)
    assert 0.49 <= share_of(small, dense) <= 0.5
    assert count(small, SHAPE).params < 0.7 * count(dense, SHAPE).params
    widths = [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)]
    full = [m.out_channels for m in dense.modules() if isinstance(m, nn.Conv2d)]
    assert any(a < b for a, b in zip(widths, full, strict=True))
    assert all(8 * a >= b - 4 for a, b in zip(widths, full, strict=True))


@pytest.mark.parametrize("kind", ["resnet", "vgg"])
def test_a_pruned_network_learns(kind):
    small = prune(network(kind), 0.6, images(), importance="l2", everywhere=False).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05)
    x, label = images(), torch.arange(48) % 5
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(small(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_all_of_the_budget_leaves_the_network_as_it_is():
    dense = network("resnet")
    small = prune(dense, 1.0, images(), importance="depgraph", everywhere=True)
    torch.testing.assert_close(small(images()), dense(images()), rtol=1e-3, atol=1e-4)


def test_the_smallest_filters_go_first():
    dense = network("vgg")
    with torch.no_grad():
        dense[0].weight[[2, 5]] *= 1e-3
    small = prune(dense, 0.85, images(), importance="l1", everywhere=False)
    gone = 12 - small[0].out_channels
    assert gone >= 1
    size = dense[0].weight.abs().sum((1, 2, 3))
    kept = sorted(size.argsort(descending=True)[: 12 - gone].tolist())
    torch.testing.assert_close(small[0].weight, dense[0].weight[kept])


@pytest.mark.parametrize("everywhere", [False, True], ids=["local", "global"])
def test_depgraph_cuts_what_torch_prunings_own_pruner_cuts(everywhere):
    dense = network("resnet")
    theirs = copy.deepcopy(dense)
    tp.pruner.BasePruner(
        theirs,
        images(1),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=everywhere,
        pruning_ratio=0.25,
        max_pruning_ratio=0.875,
        ignored_layers=[theirs.head],
    ).step()
    share = share_of(theirs, dense)
    ours = prune(dense, share, images(), importance="depgraph", everywhere=everywhere)
    assert share_of(ours, dense) == pytest.approx(share, abs=1e-6)
    for (name, mine), (_, other) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        if isinstance(mine, nn.Conv2d):
            torch.testing.assert_close(mine.weight, other.weight, msg=name)


def test_the_network_that_is_pruned_is_not_changed():
    dense = network("vgg")
    before = copy.deepcopy(dense.state_dict())
    prune(dense, 0.5, images(), importance="l1", everywhere=True)
    for key, value in dense.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_budget_out_of_reach_is_refused():
    with pytest.raises(UserError, match=r"l1 at 0\.001 of the MACs: even its smallest network"):
        prune(network("vgg"), 0.001, images(), importance="l1", everywhere=False)


def test_depthwise_convolutions_shrink_and_grouped_ones_stay():
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 12, 1),
        nn.Conv2d(12, 12, 3, padding=1, groups=2),
        nn.Conv2d(12, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()
    small = prune(dense, 0.7, images(), importance="l1", everywhere=False)
    assert small(images()).shape == (48, 5)
    assert small[1].groups == small[1].out_channels == small[0].out_channels < 16
    assert (small[3].in_channels, small[3].out_channels, small[3].groups) == (12, 12, 2)
    assert small[7].out_features == 5


def test_layers_solved_anew_bring_a_pruned_network_nearer_to_the_dense_one():
    dense = network("resnet")
    x = images()
    errors = {}
    for compensated in (False, True):
        small = prune(
            dense,
            0.6,
            x,
            importance="depgraph",
            everywhere=False,
            compensated=compensated,
            statistics="moved",
        )
        with torch.no_grad():
            errors[compensated] = float((small(x) - dense(x)).square().mean())
    assert errors[True] < 0.8 * errors[False]


def test_statistics_that_are_moved_are_the_networks_own_where_nothing_goes():
    dense = network("resnet")
    small = prune(dense, 1.0, images(), importance="l1", everywhere=False, statistics="moved")
    torch.testing.assert_close(small(images()), dense(images()), rtol=1e-5, atol=1e-6)


def test_a_network_of_features_keeps_all_of_them():
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 20, 3, padding=1, bias=False),
        nn.BatchNorm2d(20),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()
    small = prune(features, 0.7, images(), importance="depgraph", everywhere=False)
    assert small(images()).shape == features(images()).shape
    assert small[0].out_channels < 12 and small[3].out_channels == 20
