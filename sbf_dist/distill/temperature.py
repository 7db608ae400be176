"""The temperature of a teacher's softmax with which labels that it has not seen are most probable.

Guo et al. 2017, "On Calibration of Modern Neural Networks": one number, which changes no answer but
how sure the teacher is of it.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sbf_dist.distill.teachers import Member
from sbf_dist.files import read_json, write_json

LEAST, MOST = 0.05, 20.0  # where all answers are right, or none, there is no best one


@dataclass(frozen=True)
class FittedTemperature:
    """The temperature, and the mean negative log-likelihood (nats) at 1 and with it."""

    temperature: float
    before: float
    after: float
    images: int

    def __str__(self) -> str:
        at_a_bound = not LEAST * 1.01 < self.temperature < MOST * 0.99
        note = ", the limit" if at_a_bound else ""
        return (
            f"temperature {self.temperature:.2f}{note} (cross-entropy on {self.images} validation "
            f"images {self.before:.3f}, with it {self.after:.3f})"
        )


def fit_temperature(member: Member, logits: Tensor, labels: Tensor) -> FittedTemperature:
    """Fit a teacher's temperature; `logits` as Member.probabilities takes them, `labels` (N,)."""
    assert len(labels) == logits.shape[1] > 0

    def loss(exponent: float) -> float:
        softened = dataclasses.replace(member, temperature=math.exp(exponent))
        own = softened.probabilities(logits.double())[torch.arange(len(labels)), labels]
        return float(-own.clamp_min(torch.finfo(torch.float32).tiny).log().mean())

    bounds = (math.log(LEAST), math.log(MOST))
    from scipy.optimize import minimize_scalar  # which all workers would import at their start

    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    # Where all answers are right the loss is flat before the limit.
    best = min((*bounds, float(found.x)), key=loss)
    return FittedTemperature(
        temperature=round(math.exp(best), 4),
        before=round(loss(0.0), 4),
        after=round(loss(best), 4),
        images=len(labels),
    )


def read_temperatures(file: Path) -> dict[str, FittedTemperature]:
    """Return what was fitted, by the names of teachers; nothing without the file.

    UserError if it is damaged.
    """
    if not file.exists():
        return {}
    found = read_json(file, "fit them again (--again pseudo-labels)")
    return {name: FittedTemperature(**values) for name, values in found.items()}


def write_temperatures(file: Path, fitted: Mapping[str, FittedTemperature]) -> None:
    """Keep what was fitted, in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {name: dataclasses.asdict(one) for name, one in fitted.items()})
