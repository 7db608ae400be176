"""Layers that share their weights, and layers whose weights are computed."""

import pytest
import torch
from small_networks import Small, pictures
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from sbf_dist.budget import Budget
from sbf_dist.compression.cost import count
from sbf_dist.compression.joint import plan_jointly
from sbf_dist.compression.one_shot import compress
from sbf_dist.errors import UserError
from sbf_dist.export.optimize import optimize
from sbf_dist.settings import Compression

NAME = "small"


class Tied(nn.Module):
    """Three convolutions, of which two have one weight."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.conv2.weight = self.conv1.weight
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        for conv in (self.conv1, self.conv2, self.conv3):
            x = conv(x).relu()
        return self.head(x.mean((2, 3)))


def tied():
    torch.manual_seed(0)
    return Tied().eval()


def parameters(model):
    return sum(x.numel() for x in model.parameters())


def test_both_users_of_a_weight_stay_dense_and_it_counts_once():
    network = tied()
    student, plan = compress(network, pictures(64), params=0.8, name=NAME)
    assert "also that of conv2" in plan.layers["conv1"].reason
    assert "also that of conv1" in plan.layers["conv2"].reason
    assert plan.layers["conv3"].kind == "sbf"
    assert student.conv1.weight is student.conv2.weight
    assert torch.equal(student.conv1.weight, network.conv1.weight)
    assert plan.params_before == parameters(network)
    assert plan.params_after == parameters(student) <= 0.8 * parameters(network)


def test_what_sharing_puts_out_of_reach_is_refused():
    with pytest.raises(UserError, match=r"params = 0.5 .* the smallest that works is 0.61"):
        compress(tied(), pictures(64), params=0.5, name=NAME)


@pytest.mark.parametrize("budget", [{"params": 0.8}, {"macs": 0.8}])
def test_channels_of_a_shared_weight_are_not_removed(budget):
    network = tied()
    student, plan = plan_jointly(
        network, pictures(64), Compression(**budget, removal=1.0), name=NAME
    )
    assert student.conv1.weight is student.conv2.weight
    assert parameters(student) == plan.params_after < parameters(network)
    assert torch.equal(student.conv1.weight, network.conv1.weight[:, :])


def test_a_budget_that_is_not_met_is_an_error():
    budget = Budget(params=0.6)
    budget.check(60, 100)
    with pytest.raises(UserError, match=r"params = 0.6 is not met: .* 92 of .* 100 parameters"):
        budget.check(92, 100)


def masked(conv):
    prune.l1_unstructured(conv, "weight", 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("compute", "told"),
    [
        (weight_norm, "the filters that Conv2d computes are frozen"),
        (spectral_norm, "the filters that Conv2d computes are frozen"),
        (masked, "forward hooks"),
        (parametrizations.weight_norm, "the filters that ParametrizedConv2d computes are frozen"),
        (parametrizations.spectral_norm, "the filters that ParametrizedConv2d computes are froz"),
    ],
)
def test_a_trained_layer_whose_weight_is_computed_is_frozen_or_stays_with_the_reason(compute, told):
    torch.manual_seed(0)
    network = Small()
    compute(network.conv1)
    network(pictures(8)).sum().backward()  # which leaves it a weight with a history
    network.eval()
    student, plan = compress(network, pictures(64), macs=0.8, name=NAME)
    assert told in plan.layers["conv1"].reason
    assert plan.layers["conv2"].kind == "sbf"
    assert count(student, (3, 10, 10)).macs == plan.macs_after
    images = pictures(4)
    for model in (network, student):
        torch.testing.assert_close(optimize(model)(images), model(images), rtol=1e-4, atol=1e-5)
    _, plan = plan_jointly(network, pictures(64), Compression(macs=0.9, removal=0.5), name=NAME)
    assert plan.macs_after <= 0.9 * plan.macs_before
