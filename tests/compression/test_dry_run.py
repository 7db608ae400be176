"""Networks whose code needs values cannot run without computing."""

import numpy as np
import pytest
import torch
from small_networks import Silent, pictures, small
from torch import nn

from sbf_dist.compression.cost import count
from sbf_dist.compression.dry_run import dry_run
from sbf_dist.compression.one_shot import compress


def computing(before):
    """A `small` network whose images go through a function first."""

    class Computing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()
            self.mean = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)

        def forward(self, x):
            return self.net(before(self, x))

    return Computing().eval()


NEED_VALUES = {
    "an attribute that is no buffer": lambda self, x: x - self.mean,
    "torch.ones": lambda self, x: x + torch.ones(x.shape[-1]),
    "from_numpy": lambda self, x: x + torch.from_numpy(np.full((1, 1), 0.5, dtype=np.float32)),
    "item": lambda self, x: x * (1 + x.abs().mean().item()),
    "a branch": lambda self, x: x if x.abs().mean() > 0 else x + 1,
}


@pytest.mark.parametrize("what", NEED_VALUES)
def test_networks_that_need_values_cost_what_those_cost_that_do_not(what):
    network = computing(NEED_VALUES[what])
    cost, plain = count(network, (3, 10, 10)), count(network.net, (3, 10, 10))
    assert (cost.macs, cost.params) == (plain.macs, plain.params)
    assert cost.layers["net.conv1"] == plain.layers["conv1"] == 100 * 8 * 16 * 9


@pytest.mark.parametrize("what", NEED_VALUES)
def test_networks_that_need_values_are_compressed(what):
    student, plan = compress(
        computing(NEED_VALUES[what]),
        pictures(64),
        name="computing",
        macs=0.6,
    )
    assert count(student, (3, 10, 10)).macs == plan.macs_after <= 0.6 * plan.macs_before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_cost_does_not_depend_on_the_type_of_numbers(dtype):
    branching = computing(NEED_VALUES["a branch"]).to(dtype)
    assert count(branching, (3, 10, 10)).macs == count(small().to(dtype), (3, 10, 10)).macs
    assert count(small().to(dtype), (3, 10, 10)) == count(small(), (3, 10, 10))


def test_a_branch_is_taken_as_the_image_has_it():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.stem(x) if x.mean() > 5 else x

    assert count(Branching(), (3, 9, 9), torch.full((1, 3, 9, 9), 9.0)).macs == 7 * 7 * 8 * 27
    assert count(Branching(), (3, 9, 9)).macs == 0


def test_nothing_is_computed_where_that_is_possible_and_the_error_of_the_real_run_is_raised():
    devices = []

    def run(network, image):
        devices.append(image.device.type)
        if len(devices) > 1:
            raise ValueError(f"on {image.device.type}")
        return network(image)

    assert dry_run(small(), (3, 10, 10), run).shape == (1, 5)
    assert devices == ["meta"]
    with pytest.raises(ValueError, match="on cpu"):
        dry_run(small(), (3, 10, 10), run)


def test_a_network_whose_train_returns_nothing_is_run_with_and_without_values():
    def form(network, image):
        return tuple(network(image).shape)

    assert dry_run(Silent(small()), (3, 10, 10), form) == (1, 5)
    needing = Silent(computing(NEED_VALUES["item"]))
    assert dry_run(needing, (3, 10, 10), form) == (1, 5)
