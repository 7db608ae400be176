import ctypes
import itertools
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbf_dist.budget import ROUNDING, Budget
from sbf_dist.compression.planning import knapsack
from sbf_dist.compression.planning.knapsack import Option, allocate, frontier
from sbf_dist.errors import UserError


def table(layers, data, scale):
    """Random options by layer; the first of each layer is the dense one."""
    options = {}
    for layer in range(layers):
        dense = data.draw(st.integers(50, 200))
        count = data.draw(st.integers(0, 4))
        options[f"layer{layer}"] = [
            Option(16, 0, 1, dense, 0.0),
            *(
                Option(
                    kept=k,
                    sources=1,
                    size=3,
                    cost=data.draw(st.integers(5, dense - 1)),
                    loss=scale * data.draw(st.floats(0.01, 10)),
                )
                for k in range(1, count + 1)
            ),
        ]
    return options


def brute_force(options, fixed, budget):
    choices = itertools.product(*options.values())
    losses = [
        sum(o.loss for o in choice)
        for choice in choices
        if fixed + sum(o.cost for o in choice) <= budget * (1 + ROUNDING)
    ]
    return min(losses, default=None)


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 4),
    fixed=st.integers(0, 100),
    # Thousandths of whole costs: no budget lies within rounding of a choice's cost.
    share=st.integers(50, 1000).map(lambda thousandths: thousandths / 1000),
    scale=st.sampled_from([1e-9, 1.0, 1e9]),
    data=st.data(),
)
def test_the_choice_is_as_good_as_the_best_of_all(layers, fixed, share, scale, data):
    options = table(layers, data, scale)
    dense = fixed + sum(row[0].cost for row in options.values())
    best = brute_force(options, fixed, share * dense)
    if best is None:
        with pytest.raises(UserError):
            allocate(options, fixed=fixed, dense=dense, budget=Budget(macs=share))
        return
    chosen = allocate(options, fixed=fixed, dense=dense, budget=Budget(macs=share))
    assert list(chosen) == list(options)
    assert all(option in options[name] for name, option in chosen.items())
    cost = fixed + sum(option.cost for option in chosen.values())
    assert cost <= share * dense * (1 + 1e-6)
    assert sum(option.loss for option in chosen.values()) <= best * (1 + 1e-3) + 1e-4 * scale


OPTIONS = {
    "a": [Option(8, 0, 1, 300, 0.0), Option(2, 1, 3, 101, 1.0)],
    "b": [Option(8, 0, 1, 300, 0.0), Option(2, 1, 3, 57, 9.0)],
}


def test_the_whole_budget_leaves_everything_dense():
    chosen = allocate(OPTIONS, fixed=100, dense=700, budget=Budget(macs=1.0))
    assert {option.sources for option in chosen.values()} == {0}


def test_a_budget_below_the_floor_names_the_smallest_share_and_that_works():
    with pytest.raises(UserError) as told:
        allocate(OPTIONS, fixed=100, dense=700, budget=Budget(macs=0.2))
    assert "macs = 0.2 of the dense network" in str(told.value)
    smallest = float(re.search(r"smallest that works is (\S+)$", str(told.value))[1])
    assert 258 / 700 <= smallest < 258 / 700 + 1e-3
    chosen = allocate(OPTIONS, fixed=100, dense=700, budget=Budget(macs=smallest))
    assert {option.sources for option in chosen.values()} == {1}


def test_scale_of_losses_and_costs_does_not_matter():
    small = {
        name: [Option(o.kept, o.sources, o.size, o.cost * 1e9, o.loss * 1e-12) for o in row]
        for name, row in OPTIONS.items()
    }
    chosen = allocate(small, fixed=100e9, dense=700e9, budget=Budget(macs=0.72))
    assert {name: option.sources for name, option in chosen.items()} == {"a": 1, "b": 0}


def test_a_choice_that_is_over_the_budget_by_less_than_the_solvers_tolerance_is_not_taken(
    monkeypatch,
):
    """By 250 of 308 million multiply-adds, as a network of 49 convolutions was."""
    solve = knapsack.milp

    def milp(losses, *, constraints, **given):
        members, costs = constraints
        # As far as HiGHS may go, which it does not in problems as small as this one.
        tolerated = knapsack.LinearConstraint(costs.A, costs.lb, costs.ub + 1e-6)
        return solve(losses, constraints=[members, tolerated], **given)

    monkeypatch.setattr(knapsack, "milp", milp)
    over, under = Option(8, 4, 1, 200_000_250, 0.1), Option(7, 4, 1, 190_000_000, 0.2)
    options = {"layer": [Option(16, 0, 1, 300_000_000, 0.0), over, under]}
    total = 400_000_000
    chosen = allocate(options, fixed=100_000_000, dense=total, budget=Budget(macs=0.75))
    assert chosen["layer"] == under
    # Where nothing else is within the tolerance, the cheapest is.
    exact = Option(8, 4, 1, 199_999_900, 0.1)
    options["layer"][1:] = [over, exact]
    chosen = allocate(options, fixed=100_000_000, dense=total, budget=Budget(macs=0.75))
    assert chosen["layer"] == exact


def test_milliseconds_are_met_as_they_are():
    chosen = allocate(OPTIONS, fixed=100, dense=700, budget=Budget(latency_ms=510))
    assert {name: option.sources for name, option in chosen.items()} == {"a": 1, "b": 0}


@pytest.mark.parametrize("key", ["latency", "latency_ms"])
def test_a_time_that_is_not_reached_names_the_smallest_that_is(key):
    with pytest.raises(UserError) as told:
        allocate(OPTIONS, fixed=100, dense=700, budget=Budget(**{key: 0.2}))
    assert str(told.value).startswith(f"{key} = 0.2 of the dense network's 700")
    smallest = float(re.search(r"smallest that works is (\S+)$", str(told.value))[1])
    assert smallest == pytest.approx(258 if key == "latency_ms" else 258 / 700, abs=1e-3)
    assert allocate(OPTIONS, fixed=100, dense=700, budget=Budget(**{key: smallest}))


@pytest.mark.parametrize("key", ["macs", "params"])
def test_a_number_is_met_as_its_share_is(key):
    chosen = allocate(OPTIONS, fixed=100, dense=700, budget=Budget(**{key: 510}))
    assert {name: option.sources for name, option in chosen.items()} == {"a": 1, "b": 0}


@pytest.mark.parametrize(
    ("budget", "unit"), [("macs", "multiply-adds"), ("params", "parameters")], ids=str
)
def test_an_absolute_budget_that_is_too_small_names_the_smallest_that_works(budget, unit):
    with pytest.raises(UserError) as told:
        allocate(OPTIONS, fixed=100, dense=700, budget=Budget(**{budget: 200}))
    assert str(told.value) == (
        f"{budget} = 200 of the dense network's 700 {unit} is less than floor, round_to and keep "
        "allow: the smallest that works is 258"
    )
    assert allocate(OPTIONS, fixed=100, dense=700, budget=Budget(**{budget: 258}))


def test_the_frontier_is_what_no_other_option_beats():
    row = [
        Option(8, 0, 1, 100, 0.0),
        Option(4, 1, 1, 50, 2.0),
        Option(4, 1, 3, 60, 1.0),
        Option(3, 2, 3, 60, 1.5),  # as dear, loses more
        Option(2, 4, 3, 55, 2.0),  # dearer than the first at the same loss
    ]
    assert frontier(row) == [row[1], row[2], row[0]]


def test_what_the_layers_take_alone_may_exceed_the_whole():
    # A negative rest: layers timed alone sum to more than the network.
    chosen = allocate(OPTIONS, fixed=-100, dense=500, budget=Budget(latency=0.61))
    assert {name: option.sources for name, option in chosen.items()} == {"a": 1, "b": 0}


def test_the_solver_prints_nothing(monkeypatch, capfd):
    def printing(*args, **settings):
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\n")
        ctypes.CDLL(None).printf(b"from C, in its own buffer\n")
        return solve(*args, **settings)

    solve = knapsack.milp
    monkeypatch.setattr(knapsack, "milp", printing)
    row = [Option(8, 0, 1, cost=10, loss=0.0), Option(4, 2, 1, cost=5, loss=1.0)]
    print("before")
    chosen = allocate({"a": row, "b": row}, fixed=0, dense=20, budget=Budget(macs=0.75))
    print("after")
    assert sum(option.cost for option in chosen.values()) == 15
    assert capfd.readouterr().out == "before\nafter\n"
