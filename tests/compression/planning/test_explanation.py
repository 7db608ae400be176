import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import pictures, small

from sbf_dist.budget import Budget
from sbf_dist.compression.planning.explanation import Spending, neighbours
from sbf_dist.compression.planning.knapsack import Option
from sbf_dist.compression.planning.options import Search
from sbf_dist.compression.reconstruct import rebuild
from sbf_dist.settings import Compression

M = 1e6
ROWS = {
    "a": [
        Option(32, 0, 1, 4 * M, 0.0),
        Option(8, 1, 3, 1 * M, 0.04),
        Option(16, 2, 3, 2 * M, 0.01),
        Option(15, 2, 3, 1.9 * M, 0.03),  # off the hull
    ],
    "b": [Option(32, 0, 1, 3 * M, 0.0), Option(24, 2, 1, 2 * M, 0.5)],
    "c": [Option(8, 0, 1, 1 * M, 0.0)],
}


def spending(**chosen):
    picked = {name: ROWS[name][chosen.get(name, 0)] for name in ROWS}
    return Spending(
        search=Search(Compression(macs=0.8, round_to=8)),
        options=ROWS,
        chosen=picked,
        channels={"a": 32, "b": 32, "c": 8},
        criteria={"a": "l1", "b": "l1", "c": "l2 (no batch norm reads its output)"},
        dense=10 * M,
        before=10 * M,
        after=10 * M - sum(ROWS[n][0].cost - o.cost for n, o in picked.items()),
    )


def test_a_reason_tells_form_cost_shares_loss_and_the_next_steps():
    assert spending(a=2).reason("a") == (
        "16 of 32 filters kept by l1, 2 sources, m = 3; 4 -> 2 M multiply-adds, 40 % of the "
        "network's before and 25 % after; adds about 0.01 to the loss; "
        "one step cheaper, 8 kept, 1 source, m = 3: -1 M multiply-adds, +0.03 loss, "
        "-0.03 per M multiply-adds; "
        "one step more expensive, dense: +2 M multiply-adds, -0.01 loss, -0.005 per M multiply-adds"
    )


def test_a_layer_that_stays_tells_why():
    spent = spending(a=2)
    assert spent.reason("b").startswith("shrinking other layers costs less; 3 -> 3 M multiply-adds")
    assert "one step cheaper, 24 kept, 2 sources, m = 1: -1 M multiply-adds, +0.5" in (
        spent.reason("b")
    )
    assert spent.reason("c").startswith("its 8 filters are no more than floor and round_to keep; ")


def test_the_explanation_tells_budget_criteria_savings_prices_and_what_is_protected():
    assert spending(a=1).explain({"stem": "the stem: it reads the image itself"}) == [
        "Budget: macs = 0.8, 8 of the dense network's 10 M multiply-adds; reached: 7, 70 %.",
        "Criterion: l1 in 2 layers, l2 (no batch norm reads its output) in 1 layer.",
        "Estimated to add 0.04 to the loss before training, most in a (0.04).",
        "Saved 3 M multiply-adds, most in a (100 %).",
        "More budget would help most in a: 0.03 less loss per M multiply-adds.",
        "Less budget would cost least in b: 0.5 more loss per M multiply-adds.",
        "At the minimum of floor and round_to: a.",
        "Unchanged (the stem: it reads the image itself): stem.",
        "Unchanged (shrinking other layers costs less): b.",
        "Unchanged (its 8 filters are no more than floor and round_to keep): c.",
    ]


@settings(deadline=None)
@given(
    points=st.lists(
        st.tuples(st.integers(1, 50), st.floats(0.001, 10)), min_size=1, max_size=12, unique=True
    ),
    data=st.data(),
)
def test_the_next_steps_are_on_the_hull_and_what_they_buy_falls_with_cost(points, data):
    row = [Option(9, 0, 1, 60, 0.0), *(Option(1, 1, 1, c, loss) for c, loss in points)]
    prices, here = [], row[0]
    while (cheaper := neighbours(row, here)[0]) is not None:
        assert cheaper in row
        prices.append((cheaper.loss - here.loss) / (here.cost - cheaper.cost))
        here = cheaper
    assert all(p > 0 for p in prices)
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(prices))
    option = data.draw(st.sampled_from(row))
    cheaper, dearer = neighbours(row, option)
    assert cheaper is None or (cheaper.cost < option.cost and cheaper.loss > option.loss)
    assert dearer is None or (dearer.cost > option.cost and dearer.loss < option.loss)


@pytest.mark.parametrize("budget", [Budget(macs=0.5), Budget(params=0.5)], ids=str)
def test_a_plan_explains_itself_in_the_unit_of_its_budget(budget):
    _, plan = rebuild(small(), pictures(), Compression(**budget.given()))
    before, after = plan.macs_before, plan.macs_after
    unit, size = ("M multiply-adds", 1e6)
    if budget.kind == "params":
        before, after, unit, size = plan.params_before, plan.params_after, "k parameters", 1e3
    assert plan.explanation[0] == (
        f"Budget: {budget.kind} = 0.5, {before / size / 2:.4g} of the dense network's "
        f"{before / size:.4g} {unit}; reached: {after / size:.4g}, {100 * after / before:.3g} %."
    )
    for name, layer in plan.layers.items():
        if name == "stem":
            continue
        costs = re.search(rf"; (\S+) -> (\S+) {unit}, (\S+) % of the", layer.reason)
        assert costs, layer.reason
        if budget.kind == "macs" and layer.kind == "sbf":
            assert float(costs[1]) == pytest.approx(layer.macs_before / size, rel=1e-3)
            assert float(costs[2]) == pytest.approx(layer.macs_after / size, rel=1e-3)
