"""Hours of a whole run on so many GPUs."""

import math
from dataclasses import dataclass

from launchers.estimate.machines import Machine
from launchers.estimate.timing import DECODED_PER_S, step_time
from launchers.estimate.trainings import Planned, PlannedRun

# Bytes a second of a rank's shard of a checkpoint by which a step is longer: it is copied, and
# written while the next steps run (benchmarks/results/overhead.json, 2026-11-27: ResNet-18, 94 MB).
CHECKPOINT_BYTES_PER_S = 1e8
# From the command to the first step, on two workers of one machine with two cores: 19.4 s
# (benchmarks/results/startup.json, 2026-11-27). A later stage finds Ray running.
START_S = 20.0
# Processor seconds of fitting a student, for each image and multiply-add of the dense network:
# ResNet-50, 512 images (benchmarks/results/fitting-cost.json).
FITTING_S = 1251 / 512 / 4.089e9
FITTING_THREADS = 4  # that a fit keeps busy
HOUR_S = 3600.0


@dataclass(frozen=True)
class RunCost:
    """Hours of a run: of each training (None: it does not divide), of all else, and of machines."""

    gpus: int
    machines: int
    trainings: dict[str, float | None]
    rest: float

    @property
    def hours(self) -> float | None:
        """All of it; None where a training does not divide."""
        parts = list(self.trainings.values())
        return None if None in parts else self.rest + sum(part for part in parts if part)

    @property
    def machine_hours(self) -> float | None:
        """What is paid for."""
        return None if self.hours is None else self.hours * self.machines


def run_cost(
    run: PlannedRun,
    machine: Machine,
    gpus: int,
    *,
    labelling: float,
    fitting_images: int,
    batch_per_gpu: int | None = None,
) -> RunCost:
    """Estimate a run on so many GPUs, a worker on each, with the recipe's batches.

    `labelling` is the number of images that teachers predict once, `fitting_images` that of the
    calibration. With `batch_per_gpu` the batches grow with the number of GPUs instead, and there
    are fewer steps, so that as many images are seen.
    """
    trainings = run.trainings
    macs = sum(teacher.asked_macs for teacher in run.teachers)
    threads = machine.cpus * math.ceil(gpus / machine.gpus)
    predicted = max(
        labelling * macs / (machine.training_macs_per_s * gpus),
        labelling / (DECODED_PER_S * threads),
    )
    fitting = FITTING_S * run.compressed.cost.macs * fitting_images / FITTING_THREADS
    stages = 2 + len({planned.job.group for planned in trainings})  # labels and evaluation beside
    return RunCost(
        gpus=gpus,
        machines=math.ceil(gpus / machine.gpus),
        trainings={
            planned.name: training_hours(planned, machine, gpus, batch_per_gpu)
            for planned in trainings
        },
        rest=(predicted + fitting + stages * START_S) / HOUR_S,
    )


def training_hours(
    planned: Planned, machine: Machine, gpus: int, batch_per_gpu: int | None = None
) -> float | None:
    """Estimate the hours of one training; None where its batch does not divide, or is too small."""
    assert planned.steps is not None
    images, rest = divmod(planned.batch, gpus)
    steps: float = planned.steps
    if batch_per_gpu is not None:
        steps, images = planned.steps * planned.batch / (batch_per_gpu * gpus), batch_per_gpu
    elif rest or not images:
        return None
    training = planned.job.training
    step = step_time(planned.work(), machine, gpus=gpus, images=images).total
    state = planned.state(gpus)
    saving = (state.weights + state.optimizer) / CHECKPOINT_BYTES_PER_S / training.checkpoint_every
    return steps * (step + saving) / HOUR_S
