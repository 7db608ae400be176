"""The plan that a student keeps, so that `save` does not need it as an argument."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from sbf_dist.compression.plan import Plan
from sbf_dist.errors import UserError


@dataclass(frozen=True)
class _Remembered:
    """The plan of a student: copies of the student share it."""

    plan: Plan

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Remembered":
        return self


def remember(student: nn.Module, plan: Plan) -> nn.Module:
    """Keep `plan` with its student, for `plan_of`; return the student."""
    student._sbf_plan = _Remembered(plan)  # type: ignore[assignment]
    return student


def plan_of(student: nn.Module) -> Plan:
    """Return the plan that `compress`, `shrink`, `convert` or `load` kept with a student.

    Raises UserError for any other network.
    """
    remembered = getattr(student, "_sbf_plan", None)
    if not isinstance(remembered, _Remembered):
        raise UserError(
            f"{type(student).__name__} has no plan: give a network as compress, shrink, convert or "
            "load returned it, not one that was optimized or wrapped"
        )
    return remembered.plan
