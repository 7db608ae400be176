import pytest
import torch
from small_networks import Merging
from torch import nn

from sbf_dist import models
from sbf_dist.distill.features import FeatureLoss, Watched, feature_channels, feature_loss
from sbf_dist.errors import UserError

SHAPE = (3, 16, 16)


@pytest.mark.parametrize(
    ("name", "layer", "channels"),
    [
        ("cifar_resnet8", "stages", 64),
        ("cifar_vgg11_w16", "features", 128),
        ("timm:resnet18", "layer4", 512),
    ],
)
def test_the_last_features_are_those_before_pooling(name, layer, channels):
    found = feature_channels(models.build(name, 10), (3, 64, 64))
    assert list(found.items())[-1] == (layer, channels)


def test_looking_leaves_the_network_as_it_was():
    network = models.build("cifar_resnet8", 10).train()
    network.stages[0].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    feature_channels(network, SHAPE)
    assert network.training
    assert not network.stages[0].training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


class Quiet(nn.Sequential):
    """Its train() returns nothing, as that of many backbones."""

    def train(self, mode=True):
        super().train(mode)


def test_looking_needs_no_result_of_the_network_s_train():
    assert feature_channels(Quiet(nn.Conv2d(3, 4, 3), nn.ReLU()), (3, 8, 8)) == {"0": 4, "1": 4}


def test_the_error_is_a_share_of_the_teachers_variance_and_a_mean_over_layers():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        {name: torch.randn(4, 2, 3, 3, generator=generator) for name in "ab"} for _ in range(2)
    )
    loss = FeatureLoss({"a": (2, 2), "b": (2, 2)})(student, teacher)
    errors = [
        (student[name] - teacher[name]).square().mean() / teacher[name].var(correction=0)
        for name in "ab"
    ]
    torch.testing.assert_close(loss, (errors[0] + errors[1]) / 2)
    scaled = {name: 10 * value for name, value in teacher.items()}
    equal = FeatureLoss({"a": (2, 2), "b": (2, 2)})(scaled, scaled)
    assert equal.item() == 0


def test_channels_that_differ_are_projected_and_larger_features_averaged():
    loss = FeatureLoss({"a": (2, 3)})
    assert loss.projections[0].weight.shape == (3, 2, 1, 1)
    student, teacher = torch.randn(4, 2, 3, 3), torch.randn(4, 3, 6, 6)
    smaller = nn.functional.avg_pool2d(teacher, 2)
    torch.testing.assert_close(
        loss({"a": student}, {"a": teacher}), loss({"a": student}, {"a": smaller})
    )


def test_a_network_keeps_what_it_gave_first_in_a_block_and_nothing_outside():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())
    watched = Watched(network, ["0"])
    first, second = torch.randn(2, 1, 3, 4, 4)
    network(second)
    with watched as found:
        network(first)
        network(second)
    assert torch.equal(found["0"], network[0](first))
    with watched as found:
        network(second)
    assert torch.equal(found["0"], network[0](second))


def test_a_layer_that_has_no_features_is_named_with_those_that_have():
    student = models.build("cifar_resnet8", 10)
    with pytest.raises(UserError, match=r"features.layers: 'head' must be .* stages.2, stages$"):
        feature_loss(student, models.build("cifar_resnet8", 10), ["head"], SHAPE)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    with pytest.raises(UserError, match="no features"):
        feature_loss(flat, flat, [], SHAPE)


def test_a_network_whose_weights_change_with_its_mode_stays_as_it_was():
    network = nn.Sequential(Merging(3, 8, 3))
    weight = network[0].weight.clone()
    assert feature_channels(network, SHAPE) == {"0": 8}
    assert not network[0].merged
    assert torch.equal(network[0].weight, weight)
