"""Sharing a global budget out among layers."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from sbf_dist.errors import UserError


@dataclass(frozen=True)
class Option:
    """One way to build a layer: its basis size and sources, its cost, the loss it causes."""

    kept: int
    sources: int
    cost: float
    loss: float


def allocate(
    options: dict[str, list[Option]], *, fixed: float, dense: float, share: float
) -> dict[str, Option]:
    """Choose one option per layer so that the summed loss is least and the cost within the budget.

    `fixed` is the cost of everything that has no options, `dense` that of the whole dense network,
    of which `share` is the budget. The multiple-choice knapsack problem is solved by mixed-integer
    programming (HiGHS) to a relative gap of 1e-4. Raises UserError, naming the smallest share that
    works, if even the cheapest options exceed it.
    """
    budget = share * dense
    cheapest = fixed + sum(min(option.cost for option in row) for row in options.values())
    if cheapest > budget:
        smallest = math.ceil(1e4 * cheapest / dense) / 1e4
        raise UserError(
            f"macs = {share:g} of the dense network is less than the layers' floors allow: the "
            f"smallest that works is {smallest:g}"
        )
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
            LinearConstraint(cost[None] / budget, -np.inf, 1 - fixed / budget),
        ],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4},
    )
    assert result.success, result.message
    chosen = np.flatnonzero(result.x > 0.5)
    return {name: flat[index] for name, index in zip(options, chosen, strict=True)}
