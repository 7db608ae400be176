"""The plan that a student keeps, so that `save` does not need it as an argument."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sbf_dist.compression.plan import Plan
from sbf_dist.errors import UserError
from sbf_dist.surgery import unwrapped


@dataclass(frozen=True)
class _Remembered:
    """The plan of a student and the shapes that its tensors had; copies of the student share it."""

    plan: Plan
    shapes: dict[str, torch.Size]

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Remembered":
        return self


def remember(student: nn.Module, plan: Plan) -> nn.Module:
    """Keep `plan` with its student, for `plan_of`; return the student."""
    student._sbf_plan = _Remembered(plan, _shapes(student))  # type: ignore[assignment]
    return student


def plan_of(student: nn.Module) -> Plan:
    """Return the plan that `compress`, `shrink`, `convert` or `load` kept with a student.

    Raises UserError for any other network, and for a student whose tensors are others than then.
    """
    student = unwrapped(student)
    remembered = getattr(student, "_sbf_plan", None)
    if not isinstance(remembered, _Remembered):
        raise UserError(
            f"{type(student).__name__} has no plan: give a network as compress, shrink, convert or "
            "load returned it, not one that was optimized or wrapped"
        )
    shapes = _shapes(student)
    for name in [*remembered.shapes, *shapes]:
        if shapes.get(name) != remembered.shapes.get(name):
            raise UserError(
                f"{type(student).__name__} is not as its plan has it: {name} has another shape, or "
                "is only in one of the two; save it before it is folded, optimized or changed"
            )
    return remembered.plan


def _shapes(student: nn.Module) -> dict[str, torch.Size]:
    state = student.state_dict()  # which may hold more than tensors: get_extra_state
    return {name: value.shape for name, value in state.items() if isinstance(value, torch.Tensor)}
