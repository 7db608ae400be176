import re

import pytest

from sbf_dist.budget import ROUNDING, Budget
from sbf_dist.errors import UserError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of macs, params, latency and latency_ms, nothing is given"),
        ({"macs": 0.5, "latency": 0.4}, "one of .*, macs = 0.5 and latency = 0.4 is given"),
        ({"macs": 0}, r"budget macs = 0 must be a share in \(0, 1\] or a whole number of mult"),
        ({"macs": 1.5}, r"budget macs = 1.5 must be a share in \(0, 1\] or a whole number of mult"),
        ({"macs": float("inf")}, r"budget macs = inf must be a share in \(0, 1\] or a whole"),
        ({"params": -5}, r"budget params = -5 must be a share .* or a whole number of parameters"),
        ({"params": 0.5, "macs": 7}, "one of .*, macs = 7 and params = 0.5 is given"),
        ({"latency": 2}, r"budget latency = 2 must be in \(0, 1\]"),
        ({"latency": -0.5}, r"budget latency = -0.5 must be in \(0, 1\]"),
        ({"latency": float("nan")}, r"budget latency = nan must be in \(0, 1\]"),
        ({"latency_ms": 0}, "budget latency_ms = 0 must be above 0"),
        ({"latency_ms": float("inf")}, "budget latency_ms = inf must be above 0"),
    ],
)
def test_a_budget_that_is_none_is_refused_in_one_line(given, message):
    with pytest.raises(UserError, match=message) as error:
        Budget(**given)
    assert "\n" not in str(error.value)


def test_shares_are_of_the_dense_network_and_milliseconds_are_themselves():
    assert Budget(macs=0.5).limit(30) == Budget(latency=0.5).limit(30) == 15
    assert Budget(latency_ms=12.5).limit(30) == 12.5
    assert Budget(latency_ms=12.5).given() == {"latency_ms": 12.5}


@pytest.mark.parametrize("key", ["macs", "params"])
def test_a_number_above_one_is_absolute(key):
    budget = Budget(**{key: 510})
    assert budget.limit(700) == 510
    assert budget.given() == {key: 510}
    assert Budget(**{key: 1}).limit(700) == 700, "one is all of it"


@pytest.mark.parametrize(
    ("budget", "own"),
    [
        (Budget(macs=2_000_000_000), "1234567 multiply-adds"),
        (Budget(params=1_234_568), "1234567 parameters"),
        (Budget(latency_ms=1_300_000), "1.235e+06 ms"),
    ],
    ids=str,
)
def test_a_budget_above_the_dense_networks_cost_is_refused_and_told_that_cost(budget, own):
    with pytest.raises(UserError, match=re.escape(f"above the dense network's own {own}")) as error:
        budget.limit(1_234_567, slack=0.02 if budget.unit == "ms" else ROUNDING)
    assert str(error.value).startswith(f"{budget.kind} = {budget.value:.0f} is above")
