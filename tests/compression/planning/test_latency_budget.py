import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sbf_dist.budget import Budget
from sbf_dist.compression.planning import latency_budget
from sbf_dist.compression.planning.knapsack import Option
from sbf_dist.compression.planning.latency_budget import TOLERANCE, allocate_time, price
from sbf_dist.compression.planning.latency_table import Timing
from sbf_dist.errors import UserError
from sbf_dist.layers import SBFConv2d

IMAGE = torch.zeros(1, 3, 10, 10)
SOURCES = 4


def network(layers: int = 4) -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(3 if i == 0 else 16, 16, 3) for i in range(layers)))


def options_of(model: nn.Module) -> dict[str, list[Option]]:
    """The dense option first; the loss grows with what is left out, and with the layer's depth."""
    forms = list(itertools.product(range(2, 16), range(1, SOURCES + 1)))
    return {
        name: [
            Option(16, 0, 1, 1e9, 0.0),
            *(
                Option(b, s, 1, 1e6, (int(name) + 1) * (16 - b) ** 2 / s)
                for b, s in forms
                if s <= b
            ),
        ]
        for name, _ in model.named_children()
    }


def alone(kept: int, sources: int) -> float:
    """What a layer takes alone: all of the dense one, or some of each part of the SBF layer."""
    return 4.0 if sources == 0 else kept / 4 + 0.1 * sources


class Table:
    """A table in which everything is."""

    batch = 3

    def __init__(self, slow: frozenset[str] = frozenset()):
        self.slow = slow  # kernels (as strings) whose SBF forms are slower than dense
        self.asked = []

    def estimate(self, conv, input_size, forms):
        self.asked.append((input_size, forms))
        extra = 10 if str(conv.in_channels) in self.slow else 0
        return [alone(f.kept, f.sources) + (extra if f.sources else 0) for f in forms]


class Machine:
    """Times networks: not the sum of their layers, and each time at another speed."""

    def __init__(self, rest=5.0, hidden=0.5, power=1.0, speeds=(1.0,)):
        self.rest, self.hidden, self.power = rest, hidden, power
        self.speeds = itertools.cycle(speeds)
        self.measured = []

    def true(self, model: nn.Module) -> float:
        total = 0.0
        for layer in model.modules():
            if isinstance(layer, SBFConv2d):
                total += alone(len(layer.kept), layer.sources.shape[1])
            elif isinstance(layer, nn.Conv2d) and layer.out_channels == 16:
                total += alone(16, 0)
        return self.rest + self.hidden * total**self.power

    def __call__(self, models, shape, *, batch):
        assert (shape, batch) == ((3, 10, 10), Table.batch)
        speed = next(self.speeds)
        self.measured.append(len(models))
        return [speed * self.true(model) for model in models]


def choose(model, budget, machine, table=None, for_inference=lambda model: model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_budget, "latencies", machine)
        return allocate_time(
            model,
            options_of(model),
            IMAGE,
            budget,
            Timing(table or Table(), for_inference),
            lambda done, of: None,
        )


def built(model, options):
    return latency_budget._build(model, options)


@settings(max_examples=20, deadline=None)
@given(
    share=st.floats(0.1, 1.0),
    rest=st.floats(0.5, 20),
    hidden=st.floats(0.2, 2),
    power=st.floats(0.9, 1.1),
    speeds=st.lists(st.floats(0.5, 2), min_size=1, max_size=4),
)
def test_the_network_as_measured_meets_the_budget_whatever_its_layers_take_alone(
    share, rest, hidden, power, speeds
):
    model, machine = network(), Machine(rest, hidden, power, speeds)
    whole = machine.true(model)
    cheapest = dict.fromkeys(options_of(model), Option(2, 1, 1, 0, 0))
    least = machine.true(built(model, cheapest)) / whole
    try:
        choice = choose(model, Budget(latency=share), machine)
    except UserError as error:
        assert least > share * (1 + TOLERANCE)
        smallest = float(re.search(r"smallest that works is (\S+)$", str(error))[1])
        assert smallest == pytest.approx(least, abs=1.1e-4)
        choice, share = choose(model, Budget(latency=smallest), machine), smallest
    assert machine.true(built(model, choice.options)) <= share * whole * (1 + TOLERANCE) * 1.001
    if least * 1.1 < share < 0.9:  # and hardly less than the budget: time left is accuracy lost
        assert machine.true(built(model, choice.options)) >= 0.9 * share * whole
    assert all(o.cost == alone(o.kept, o.sources) for o in choice.options.values())
    assert choice.dense_ms == dict.fromkeys(choice.options, alone(16, 0))


def test_milliseconds_are_met_as_well():
    model, machine = network(), Machine()
    choice = choose(model, Budget(latency_ms=9.0), machine)
    assert machine.true(model) == 13
    assert 8.5 < machine.true(built(model, choice.options)) <= 9 * (1 + TOLERANCE)


def test_the_whole_budget_leaves_everything_dense():
    choice = choose(network(), Budget(latency=1.0), Machine())
    assert {option.sources for option in choice.options.values()} == {0}
    choice = choose(network(), Budget(latency_ms=13 * (1 + TOLERANCE / 2)), Machine())
    assert {option.sources for option in choice.options.values()} == {0}, "within what is measured"


def test_a_time_above_the_dense_networks_is_refused_and_told_that_time():
    with pytest.raises(UserError, match=r"latency_ms = 1000 is above the dense network's own 13 m"):
        choose(network(), Budget(latency_ms=1000), Machine())


def test_a_layer_that_is_not_faster_in_any_form_stays_dense():
    choice = choose(network(), Budget(latency=0.8), Machine(), Table(slow=frozenset({"3"})))
    assert choice.never_faster == {"0"}
    assert choice.options["0"].sources == 0
    assert {choice.options[name].sources > 0 for name in "123"} == {True}


def test_a_network_of_which_no_layer_is_faster_is_refused():
    slow = Table(slow=frozenset({"3", "16"}))
    with pytest.raises(UserError, match=r"latency = 0.9 of .* smallest that works is 1$"):
        choose(network(), Budget(latency=0.9), Machine(speeds=[1, 0.99, 1.01]), slow)


def test_layers_are_timed_at_their_inputs_and_only_faster_options_are_kept():
    model, table, reported = network(2), Table(), []
    options = options_of(model)
    options["1"] = [options["1"][0], *(replace(o, size=3) for o in options["1"][1:])]
    priced = price(model, options, IMAGE, table, lambda *r: reported.append(r))
    assert [size for size, _ in table.asked] == [(10, 10), (8, 8)]
    assert [{f.transform_size for f in forms if f.sources} for _, forms in table.asked] == [
        {1},
        {3},
    ]
    assert {form.sources for form in table.asked[0][1]} == {0, 1, 2, 4}, "powers of two"
    assert reported == [(1, 2), (2, 2)]
    for name, row in priced.items():
        assert (row[0].sources, row[0].cost) == (0, 4.0)
        assert all(option.cost == alone(option.kept, option.sources) < 4 for option in row[1:])
        losses = {(option.kept, option.sources): option.loss for option in options[name]}
        assert all(losses[option.kept, option.sources] == option.loss for option in row)


def test_the_largest_number_of_sources_is_timed_though_it_is_no_power_of_two():
    table = Table()
    rows = {"0": [Option(16, 0, 1, 9, 0), *(Option(8, s, 3, 9, 1) for s in range(1, 8))]}
    price(network(1), rows, IMAGE, table, lambda *_: None)
    assert [form.sources for form in table.asked[0][1]] == [0, 1, 2, 4, 7]


def test_networks_are_measured_as_they_are_made_for_inference():
    made = []

    def for_inference(model):
        made.append(model)
        return model

    model, machine = network(), Machine()
    choose(model, Budget(latency=0.7), machine, for_inference=for_inference)
    assert made[0] is model
    assert len(made) == 1 + len(machine.measured)
    assert set(machine.measured) == {2}, "always beside the dense network"
