import copy

import pytest
import torch
from small_networks import pictures, small
from torch import nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.removal.coupled import find_coupled
from sbf_dist.compression.removal.elimination import eliminate, orders_by_elimination
from sbf_dist.compression.removal.readers import Reader, readers_of, solvable


def reader(channels=5, taps=1, outputs=3, rows=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels * taps, generator=generator).double()
    x = x @ torch.randn(channels * taps, channels * taps, generator=generator).double()
    gram = x.T @ x / rows
    return Reader(
        name="reader",
        weight=torch.randn(outputs, channels * taps, generator=generator).double(),
        shape=torch.Size([outputs, channels, taps]),
        columns=torch.arange(channels * taps).view(channels, taps),
        gram=gram,
        mean=torch.zeros(channels * taps).double(),
        held=None,
        held_mean=None,
        variance=gram.diagonal(),
        sensitivity=torch.rand(outputs, generator=generator).double(),
    )


def solved_loss(one, gone):
    """What is lost without channels when all other weights are solved anew, by brute force."""
    gram = one.regular_gram()
    columns = one.columns[torch.tensor(gone)].flatten().tolist()
    left = [n for n in range(len(gram)) if n not in columns]
    wanted = one.weight @ gram @ one.weight.T
    cross = one.weight @ gram[:, left]
    kept = cross @ torch.linalg.solve(gram[left][:, left], cross.T)
    return float((one.sensitivity * (wanted - kept).diagonal()).sum())


@pytest.mark.parametrize("taps", [1, 4])
def test_losses_are_those_of_readers_that_are_solved_anew(taps):
    one = reader(taps=taps)
    found = eliminate([one], 5)
    assert sorted(found.channels) == list(range(5))
    for number in range(1, 6):
        wanted = solved_loss(one, found.channels[:number])
        assert found.losses[number - 1] == pytest.approx(wanted, rel=1e-6)


def test_the_channel_that_goes_first_costs_the_least_in_all_readers_together():
    readers = [reader(seed=seed) for seed in range(3)]
    first = eliminate(readers, 5).channels[0]
    costs = [sum(solved_loss(one, [channel]) for one in readers) for channel in range(5)]
    assert first == costs.index(min(costs))


def test_losses_are_the_divergences_that_are_measured():
    model, images = small(), Calibration.of(pictures(192))
    groups, _ = find_coupled(model, pictures(2))
    group = next(group for group in groups if group.name == "conv2")
    (order,) = orders_by_elimination(model, [group], images, None, 0)
    ((_, readers),) = readers_of(model, [group], images, None, 0)
    number = 7
    x = pictures(192)
    with torch.no_grad():
        wanted = model(x).log_softmax(1)
        student = copy.deepcopy(model)
        for one in readers:
            weight, bias = one.without(torch.tensor(order.channels[:number]))
            module = student.get_submodule(one.name)
            module.weight += weight
            module.bias += bias
        made = student(x).log_softmax(1)
        measured = float((wanted.exp() * (wanted - made)).sum(1).mean())
    assert 0.3 < order.loss(number) / measured < 3


def test_a_reader_that_is_too_wide_or_grouped_is_not_solved(monkeypatch):
    model = small()
    groups, _ = find_coupled(model, pictures(2))
    assert all(solvable(model, group) for group in groups)
    monkeypatch.setattr("sbf_dist.compression.removal.readers.LARGEST_GRAM", 10)
    assert not any(solvable(model, group) for group in groups)


def test_the_weights_solved_for_a_trial_leave_a_channel_out():
    one = reader(taps=4)
    weight, _ = one.without(torch.tensor([1, 2]))
    left = (one.weight.view(3, 5, 4) + weight.double())[:, [1, 2]]
    torch.testing.assert_close(left, torch.zeros_like(left), atol=1e-6, rtol=0)
    assert nn.functional.mse_loss(weight[:, 0], torch.zeros_like(weight[:, 0])) > 0
