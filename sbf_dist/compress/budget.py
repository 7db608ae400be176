"""The budget that a network is compressed to, and sharing it out among layers."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from sbf_dist.errors import UserError

ROUNDING = 1e-9  # of a budget: sums of costs in another order differ by as much
COUNTS = {"macs": "multiply-adds", "params": "parameters"}


@dataclass(frozen=True)
class Budget:
    """What the compressed network may cost: exactly one of the four is given.

    macs, params: multiply-adds or parameters, as a share of the dense network's in (0, 1], or a
    whole number above 1; latency: measured time, as a share of the dense network's; latency_ms:
    measured milliseconds. Raises UserError for any other value, and unless exactly one is given.
    """

    macs: float | None = None
    latency: float | None = None
    latency_ms: float | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        given = self.given()
        if len(given) != 1:
            named = " and ".join(f"{key} = {value:g}" for key, value in given.items())
            raise UserError(
                "budget must be exactly one of macs, params, latency and latency_ms, "
                f"{named or 'none'} is given"
            )
        wrong = wrong_value(self.kind, self.value)
        if wrong:
            raise UserError(f"budget {self.kind} = {_told(self.value)} {wrong}")

    @property
    def kind(self) -> str:
        """Which of the four is given."""
        (kind,) = self.given()
        return kind

    @property
    def value(self) -> float:
        """What is given: a share, a number, or milliseconds."""
        (value,) = self.given().values()
        return value

    @property
    def unit(self) -> str:
        """What costs are counted in: 'multiply-adds', 'parameters' or 'ms'."""
        return COUNTS.get(self.kind, "ms")

    def given(self) -> dict[str, float]:
        """Return what was asked for, e.g. {'macs': 0.5}, as plans record it."""
        return {key: v for key, v in dataclasses.asdict(self).items() if v is not None}

    def is_share(self) -> bool:
        """Tell whether the value is a share of the dense network's cost."""
        return self.kind != "latency_ms" and self.value <= 1

    def limit(self, dense: float, slack: float = ROUNDING) -> float:
        """Return the budget in the unit of `dense`, the dense network's cost.

        Raises UserError for a budget that is above `dense` by more than the share `slack`.
        """
        if self.is_share():
            return self.value * dense
        if self.value > dense * (1 + slack):
            own = f"{dense:.4g}" if self.unit == "ms" else _told(dense)
            raise UserError(
                f"{self.kind} = {_told(self.value)} is above the dense network's own {own} "
                f"{self.unit}: it must be less to compress anything"
            )
        return self.value

    def refusal(self, cheapest: float, dense: float) -> UserError:
        """Return the error that the network cannot cost less than `cheapest`, of `dense`."""
        if self.unit == "ms":
            told = f"of the dense network's {dense:.4g} ms is less than its layers reach here"
        else:
            of = "" if self.is_share() else f"'s {_told(dense)} {self.unit}"
            told = f"of the dense network{of} is less than floor, round_to and keep allow"
        if self.is_share():
            smallest = f"{math.ceil(1e4 * cheapest / dense) / 1e4:.6g}"
        elif self.unit == "ms":
            smallest = f"{math.ceil(1e4 * cheapest) / 1e4:.6g}"
        else:
            smallest = str(math.ceil(cheapest * (1 - ROUNDING)))
        return UserError(
            f"{self.kind} = {_told(self.value)} {told}: the smallest that works is {smallest}"
        )


def wrong_value(kind: str, value: float) -> str | None:
    """Say what a budget's value must be, if it is not that: 'must be …'."""
    if kind == "latency_ms":
        return None if 0 < value < math.inf else "must be above 0"
    if 0 < value <= 1:
        return None
    if kind == "latency":
        return "must be in (0, 1]"
    if 1 < value < math.inf and float(value).is_integer():
        return None
    return f"must be a share in (0, 1] or a whole number of {COUNTS[kind]}"


def _told(value: float) -> str:
    """Write counts in full, and shares and milliseconds as they are usually written."""
    return str(int(value)) if value > 1 and float(value).is_integer() else f"{value:g}"


@dataclass(frozen=True)
class Option:
    """One way to build a layer: its basis size, sources and m; its cost, the loss it causes.

    No sources: the layer as it is. mixed: rebuilt channels are mixtures of the whole basis (see
    `mixture`).
    """

    kept: int
    sources: int
    size: int
    cost: float
    loss: float
    mixed: bool = False


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
    rows = [_worth_choosing(row) for row in options.values()]
    flat = [option for row in rows for option in row]
    loss = np.array([option.loss for option in flat])
    cost = np.array([option.cost for option in flat])
    membership = np.zeros((len(rows), len(flat)))
    start = 0
    for index, row in enumerate(rows):
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


def _worth_choosing(row: list[Option]) -> list[Option]:
    """Leave out what another option beats, but never the layer as it is."""
    best = frontier(row)
    return best if row[0] in best else [row[0], *best]
