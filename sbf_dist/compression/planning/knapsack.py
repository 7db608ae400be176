"""Choosing one option for each layer: a multiple-choice knapsack."""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from sbf_dist.budget import ROUNDING, Budget

TOLERANCE = 2e-6  # of the limit: HiGHS takes solutions that are over it by half as much


@dataclass(frozen=True)
class Option:
    """One way to build a layer: its basis size, sources and m; its cost, the loss it causes.

    No sources: the layer as it is. whole_basis: rebuilt channels read the whole basis, with m = 1
    (see `mixture`).
    """

    kept: int
    sources: int
    size: int
    cost: float
    loss: float
    whole_basis: bool = False


def frontier(row: Sequence[Option]) -> list[Option]:
    """Return the options that no other beats at both cost and loss, from cheap to dear."""
    best: list[Option] = []
    for option in sorted(row, key=lambda o: (o.cost, o.loss)):
        if not best or option.loss < best[-1].loss:
            best.append(option)
    return best


def allocate(
    options: dict[str, list[Option]], *, fixed: float, dense: float, budget: Budget
) -> dict[str, Option]:
    """Choose one option per layer so that the summed loss is least and the cost within the budget.

    The first option of a layer is the layer as it is. `fixed` is the cost of everything that has
    no options, `dense` that of the whole dense network; in the budget's unit. The multiple-choice
    knapsack problem is solved by mixed-integer programming (HiGHS) to a relative gap of 1e-4.
    Raises UserError, naming the smallest budget that works, if even the cheapest options exceed it.
    """
    limit = budget.value if budget.kind == "latency_ms" else budget.limit(dense)
    cheapest = fixed + sum(min(option.cost for option in row) for row in options.values())
    if cheapest > limit * (1 + ROUNDING):
        raise budget.refusal(cheapest, dense)
    as_it_is = fixed + sum(row[0].cost for row in options.values())
    if as_it_is <= limit * (1 + ROUNDING):
        return {name: row[0] for name, row in options.items()}
    rows = [_worth_choosing(row) for row in options.values()]
    flat = [option for row in rows for option in row]
    loss = np.array([option.loss for option in flat])
    cost = np.array([option.cost for option in flat])
    membership = np.zeros((len(rows), len(flat)))
    start = 0
    for index, row in enumerate(rows):
        membership[index, start : start + len(row)] = 1
        start += len(row)
    for slack in (ROUNDING, -TOLERANCE):
        # Scaled to about one: HiGHS' tolerances are absolute.
        with _silenced():
            result = milp(
                loss / max(loss.max(), 1e-30),
                constraints=[
                    LinearConstraint(membership, 1, 1),
                    LinearConstraint(cost[None] / limit, -np.inf, 1 - fixed / limit + slack),
                ],
                integrality=np.ones(len(flat)),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": 1e-4},
            )
        if not result.success:  # within the tolerance of the limit there is the cheapest alone
            assert slack < 0, result.message
            break
        chosen = np.flatnonzero(result.x > 0.5)
        if fixed + cost[chosen].sum() <= limit * (1 + ROUNDING):
            return {name: flat[index] for name, index in zip(options, chosen, strict=True)}
    return {name: min(row, key=lambda o: (o.cost, o.loss)) for name, row in options.items()}


@contextmanager
def _silenced() -> Iterator[None]:
    """Discard what is written to file descriptor 1: HiGHS prints there whatever its options say."""
    buffers = ctypes.CDLL(None)  # of C's standard output, which only libc can empty
    sys.stdout.flush()
    buffers.fflush(None)
    kept = os.dup(1)
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        yield
    finally:
        buffers.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _worth_choosing(row: list[Option]) -> list[Option]:
    """Leave out what another option beats, but never the layer as it is."""
    best = frontier(row)
    return best if row[0] in best else [row[0], *best]
