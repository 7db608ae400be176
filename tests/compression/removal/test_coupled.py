import copy

import pytest
import torch
from small_networks import pictures, small, small_densenet
from torch import nn

from sbf_dist import models
from sbf_dist.compression.narrow import narrow
from sbf_dist.compression.plan import Removed
from sbf_dist.compression.removal.coupled import find_coupled, removed_channels, silence


def built(name, seed=0):
    """A network whose every tensor matters, as after training."""
    torch.manual_seed(seed)
    model = (small_densenet() if name == "small DenseNet" else models.build(name, 5)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    return model


NETWORKS = {
    "cifar_resnet8": 16,
    "cifar_resnet14_w8": 16,
    "torchvision:resnet18": 32,
    "torchvision:mobilenet_v2": 32,
    "small DenseNet": 32,
    "torchvision:squeezenet1_1": 32,
    "timm:resnet26t": 32,
    "timm:efficientnet_lite0": 32,
}


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_without_channels_computes_what_it_does_when_nothing_reads_them(name):
    model = built(name)
    images = pictures(2, NETWORKS[name])
    groups, reasons = find_coupled(model, images)
    assert len(groups) >= 6
    assert all(reasons.values())
    generator = torch.Generator().manual_seed(3)
    removed = removed_channels(
        [
            (group, torch.randperm(group.size, generator=generator)[: group.size // 3].tolist())
            for group in groups
        ]
    )
    narrowed, silenced = copy.deepcopy(model), copy.deepcopy(model)
    narrow(narrowed, removed)
    silence(silenced, removed)
    wanted = silenced(images)
    torch.testing.assert_close(
        narrowed(images), wanted, rtol=0, atol=1e-3 * wanted.abs().max().item()
    )
    assert not torch.allclose(wanted, model(images), rtol=1e-2)
    assert sum(p.numel() for p in narrowed.parameters()) < 0.7 * sum(
        p.numel() for p in model.parameters()
    )


def test_what_a_shortcut_adds_together_goes_together():
    groups, _ = find_coupled(models.build("cifar_resnet8", 5), pictures(2, 16))
    stream = next(group for group in groups if group.name in ("conv", "stages.0.0.conv2"))
    sides = {(part.name, part.side) for part in stream.parts}
    assert sides == {
        ("conv", "out"),
        ("norm", "out"),
        ("stages.0.0.conv1", "inp"),
        ("stages.0.0.conv2", "out"),
        ("stages.0.0.norm2", "out"),
        ("stages.1.0.conv1", "inp"),
        ("stages.1.0.shortcut.0", "inp"),
    }
    removed = removed_channels([(stream, [2, 5])])
    assert removed["norm"] == Removed(out=[2, 5])
    assert removed["stages.1.0.conv1"] == Removed(inp=[2, 5])


def test_the_output_of_a_network_is_never_cut():
    model = small()
    groups, reasons = find_coupled(model, pictures(2))
    assert [group.name for group in groups] == ["conv2", "conv1", "stem"]
    assert reasons == {"head": "nothing but the network's output reads it"}


class Flattened(nn.Module):
    """A classifier that reads whole feature maps."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.head = nn.Linear(4 * 16, 5)

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1))


def test_a_layer_that_reads_flattened_maps_loses_all_their_positions():
    groups, _ = find_coupled(Flattened(), pictures(2))
    (conv,) = groups
    removed = removed_channels([(conv, [1])])
    assert removed == {
        "conv": Removed(out=[1]),
        "head": Removed(inp=list(range(16, 32))),
    }


class Grouped(nn.Module):
    """A grouped convolution, a normalisation over all channels, and a plain part."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.plain = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 8, 1)
        self.norm = nn.GroupNorm(1, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.plain(self.grouped(self.stem(x))).relu()
        return self.head(self.norm(self.last(x)).relu().mean((2, 3)))


def test_what_cannot_be_cut_or_is_not_independent_is_left_with_the_reason():
    groups, reasons = find_coupled(Grouped(), pictures(2))
    assert [group.name for group in groups] == ["plain"]
    assert "grouped, a grouped convolution (4 groups)" in reasons["stem"]
    assert "it is a grouped convolution (4 groups)" in reasons["grouped"]
    assert "its channels are not independent of each other" in reasons["last"]


def test_a_network_that_torch_pruning_fails_on_has_no_groups_and_says_why():
    model = models.build("torchvision:shufflenet_v2_x0_5", 5)
    groups, reasons = find_coupled(model, pictures(2, 32))
    assert groups == []
    assert "torch-pruning cannot follow it: ZeroDivisionError" in reasons[""]


class Shuffled(nn.Module):
    """Channels are shuffled in a way that a graph of operators does not show."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.second = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.first(x).relu()
        x = self.second(x + x.flip(1)).relu()
        return self.head(x.mean((2, 3)))


def test_a_group_that_the_graph_gets_wrong_is_found_out_and_left():
    groups, reasons = find_coupled(Shuffled(), pictures(2))
    assert [group.name for group in groups] == ["second"]
    assert "torch-pruning's graph does not fit it" in reasons["first"]


def test_the_model_is_left_as_it_was():
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    find_coupled(model, pictures(2))
    assert model.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not any(module._forward_hooks for module in model.modules())
