"""The budget that a network is compressed to, and sharing it out among layers."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from sbf_dist.errors import UserError

ROUNDING = 1e-9  # of a budget: sums of costs in another order differ by as much


@dataclass(frozen=True)
class Budget:
    """What the compressed network may cost: exactly one of the three is given.

    macs: multiply-adds, as a share of the dense network's; latency: measured time, as a share of
    the dense network's; latency_ms: measured milliseconds. Raises UserError for a share outside
    (0, 1], milliseconds that are not above 0, and unless exactly one is given.
    """

    macs: float | None = None
    latency: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        given = self.given()
        if len(given) != 1:
            named = " and ".join(f"{key} = {value:g}" for key, value in given.items())
            raise UserError(
                "budget must be exactly one of macs, latency and latency_ms, "
                f"{named or 'none'} is given"
            )
        ((key, value),) = given.items()
        most = math.inf if key == "latency_ms" else 1.0
        if not (0 < value <= most and math.isfinite(value)):
            right = "above 0" if key == "latency_ms" else "in (0, 1]"
            raise UserError(f"budget {key} = {value:g} must be {right}")

    def given(self) -> dict[str, float]:
        """Return what was asked for, e.g. {'macs': 0.5}, as plans record it."""
        return {key: v for key, v in dataclasses.asdict(self).items() if v is not None}

    def limit(self, dense: float) -> float:
        """Return the budget in the unit of `dense`, the dense network's cost."""
        if self.latency_ms is not None:
            return self.latency_ms
        share = self.macs if self.macs is not None else self.latency
        assert share is not None
        return share * dense

    def refusal(self, cheapest: float, dense: float) -> UserError:
        """Return the error that the network cannot cost less than `cheapest`, of `dense`."""
        ((key, value),) = self.given().items()
        smallest = cheapest if key == "latency_ms" else cheapest / dense
        told = {
            "macs": "of the dense network is less than the layers' floors allow",
            "latency": f"of the dense network's {dense:.4g} ms is less than its layers reach here",
            "latency_ms": f"of the dense network's {dense:.4g} is less than its layers reach here",
        }[key]
        return UserError(
            f"{key} = {value:g} {told}: the smallest that works is "
            f"{math.ceil(1e4 * smallest) / 1e4:.6g}"
        )


@dataclass(frozen=True)
class Option:
    """One way to build a layer: its basis size and sources, its cost, the loss it causes."""

    kept: int
    sources: int
    cost: float
    loss: float


def allocate(
    options: dict[str, list[Option]], *, fixed: float, dense: float, budget: Budget
) -> dict[str, Option]:
    """Choose one option per layer so that the summed loss is least and the cost within the budget.

    `fixed` is the cost of everything that has no options, `dense` that of the whole dense network;
    multiply-adds or milliseconds, as the budget is. The multiple-choice knapsack problem is solved
    by mixed-integer programming (HiGHS) to a relative gap of 1e-4. Raises UserError, naming the
    smallest budget that works, if even the cheapest options exceed it.
    """
    limit = budget.limit(dense)
    cheapest = fixed + sum(min(option.cost for option in row) for row in options.values())
    if cheapest > limit * (1 + ROUNDING):
        raise budget.refusal(cheapest, dense)
    flat = [option for row in options.values() for option in row]
    loss = np.array([option.loss for option in flat])
    cost = np.array([option.cost for option in flat])
    membership = np.zeros((len(options), len(flat)))
    start = 0
    for index, row in enumerate(options.values()):
        membership[index, start : start + len(row)] = 1
        start += len(row)
    # Scaled to about one: HiGHS' tolerances are absolute.
    result = milp(
        loss / max(loss.max(), 1e-30),
        constraints=[
            LinearConstraint(membership, 1, 1),
            LinearConstraint(cost[None] / limit, -np.inf, 1 - fixed / limit + ROUNDING),
        ],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4},
    )
    assert result.success, result.message
    chosen = np.flatnonzero(result.x > 0.5)
    return {name: flat[index] for name, index in zip(options, chosen, strict=True)}
