"""Whether teachers fit beside their student: the rule of `distill.targets: auto`."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sbf_dist.train.utilisation import TRAINING_PASSES

if TYPE_CHECKING:  # they import the planner, and workers import this module
    from launchers.estimate.trainings import Planned, PlannedRun

# On a CPU: largest cost of the teachers' forward passes, in training steps of the student.
MOST_COST = 3.0
# On a GPU: largest share of its memory that training and teachers may take by the estimate, which
# knows nothing of what the libraries keep for themselves.
MOST_MEMORY = 0.8


@dataclass(frozen=True)
class Choice:
    """What a student is trained towards, and why."""

    targets: Literal["live", "stored"]
    reason: str


def choose(planned: "Planned", *, workers: int, pairs: bool, device_bytes: float | None) -> Choice:
    """Choose for a training that is planned with live teachers, on so many workers.

    `device_bytes` is the memory of a worker's GPU; None: it computes on the CPU, where time counts
    and not memory.
    """
    if device_bytes is None:
        teachers = sum(teacher.asked_macs for teacher in planned.teachers)
        return by_cost(teachers, planned.views * planned.trained.cost.macs)
    return by_memory(planned.memory(workers, pairs=pairs).total, device_bytes)


def by_cost(teacher_macs: float, student_macs: float) -> Choice:
    """Choose by the multiply-adds of forward passes of all teachers, and of the student."""
    cost = teacher_macs / (TRAINING_PASSES * student_macs)
    return Choice(
        "live" if cost <= MOST_COST else "stored",
        f"live predictions cost {cost:.1f} of the student's step, limit {MOST_COST:g}",
    )


def by_memory(needed: float, device: float) -> Choice:
    """Choose by the bytes of a training with its teachers, and those of the device."""
    return Choice(
        "live" if needed <= MOST_MEMORY * device else "stored",
        f"with live predictions the training takes {needed / 1e9:.1f} GB of {device / 1e9:.1f}, "
        f"limit {MOST_MEMORY:.0%}",
    )


def settled(
    run: "PlannedRun", *, workers: int, pairs: bool, device_bytes: float | None
) -> "tuple[PlannedRun, list[str]]":
    """Choose for all trainings of a run that leave it open; a line on each of these."""
    trainings, lines = [], []
    for planned in run.trainings:
        found = planned
        if planned.towards == "auto":
            choice = choose(planned, workers=workers, pairs=pairs, device_bytes=device_bytes)
            lines.append(f"{planned.name}: {choice.targets} teachers: {choice.reason}")
            teachers = planned.teachers
            if choice.targets == "stored":
                distill = planned.job.distill
                matched = distill is not None and distill.features is not None
                teachers = (run.compressed,) if matched else ()
            found = dataclasses.replace(planned, towards=choice.targets, teachers=teachers)
        trainings.append(found)
    return dataclasses.replace(run, trainings=tuple(trainings)), lines
