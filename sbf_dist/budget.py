"""The budget that a network is compressed to."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TypedDict

from sbf_dist.errors import UserError

ROUNDING = 1e-9  # of a budget: sums of costs in another order differ by as much
COUNTS = {"macs": "multiply-adds", "params": "parameters"}
BUDGETS = ("macs", "params", "latency", "latency_ms")


class BudgetKeywords(TypedDict, total=False):
    """A budget as keywords of a call; see Budget."""

    macs: float
    params: float
    latency: float
    latency_ms: float


@dataclass(frozen=True)
class Budget:
    """The cost budget of the compressed network: give exactly one of the four.

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
                f"{named or 'nothing'} is given"
            )
        wrong = wrong_value(self.kind, self.value)
        if wrong:
            raise UserError(f"budget {self.kind} = {_written(self.value)} {wrong}")

    @property
    def kind(self) -> str:
        """The name of the budget that is given."""
        (kind,) = self.given()
        return kind

    @property
    def value(self) -> float:
        """The budget's value: a share, a number, or milliseconds."""
        (value,) = self.given().values()
        return value

    @property
    def unit(self) -> str:
        """The unit of costs: 'multiply-adds', 'parameters' or 'ms'."""
        return COUNTS.get(self.kind, "ms")

    def given(self) -> dict[str, float]:
        """Return the budget as stored in plans, e.g. {'macs': 0.5}."""
        return {key: v for key, v in dataclasses.asdict(self).items() if v is not None}

    def is_share(self) -> bool:
        """Return whether the value is a share of the dense network's cost."""
        return self.kind != "latency_ms" and self.value <= 1

    def limit(self, dense: float, slack: float = ROUNDING) -> float:
        """Return the budget in the unit of `dense`, the dense network's cost.

        Raises UserError for a budget that is above `dense` by more than the share `slack`.
        """
        if self.is_share():
            return self.value * dense
        if self.value > dense * (1 + slack):
            own = f"{dense:.4g}" if self.unit == "ms" else _written(dense)
            raise UserError(
                f"{self.kind} = {_written(self.value)} is above the dense network's own {own} "
                f"{self.unit}: it must be less to compress anything"
            )
        return self.value

    def check(self, reached: float, dense: float) -> None:
        """Raise UserError unless `reached`, what a network costs in the end, is within the budget.

        `dense` is the dense network's cost; for budgets of multiply-adds or parameters.
        """
        if reached > self.limit(dense) * (1 + ROUNDING):
            raise UserError(
                f"{self.kind} = {_written(self.value)} is not met: the network found has "
                f"{_written(reached)} of the dense network's {_written(dense)} {self.unit}, "
                f"{reached / dense:.4f}"
            )

    def refusal(self, cheapest: float, dense: float) -> UserError:
        """Return the error that the network cannot cost less than `cheapest`, of `dense`."""
        if self.unit == "ms":
            problem = (
                f"of the dense network's {dense:.4g} ms is less than its layers can reach here"
            )
        else:
            of = "" if self.is_share() else f"'s {_written(dense)} {self.unit}"
            problem = f"of the dense network{of} is less than floor, round_to and keep allow"
        if self.is_share():
            smallest = f"{math.ceil(1e4 * cheapest / dense) / 1e4:.6g}"
        elif self.unit == "ms":
            smallest = f"{math.ceil(1e4 * cheapest) / 1e4:.6g}"
        else:
            smallest = str(math.ceil(cheapest * (1 - ROUNDING)))
        return UserError(
            f"{self.kind} = {_written(self.value)} {problem}: the smallest that works is {smallest}"
        )


def wrong_value(kind: str, value: float) -> str | None:
    """Return what a wrong value of a budget must be ('must be …'), or None for a right one."""
    if kind == "latency_ms":
        return None if 0 < value < math.inf else "must be above 0"
    if 0 < value <= 1:
        return None
    if kind == "latency":
        return "must be in (0, 1]"
    if 1 < value < math.inf and float(value).is_integer():
        return None
    return f"must be a share in (0, 1] or a whole number of {COUNTS[kind]}"


def _written(value: float) -> str:
    """Format counts in full, and shares and milliseconds with up to six digits."""
    return str(int(value)) if value > 1 and float(value).is_integer() else f"{value:g}"
