"""The CPUs and GPUs of this machine, and whether they are enough."""

import logging
import os

from sbf_dist.errors import UserError

_log = logging.getLogger(__name__)


def available_cpus() -> int:
    """The CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def available_gpus() -> int:
    """The GPUs that PyTorch sees."""
    import torch

    return torch.cuda.device_count()


def check_machine(workers: int, cpus_per_worker: int, gpus_per_worker: float = 0) -> None:
    """UserError if this machine lacks CPUs or GPUs that the workers need."""
    if workers < 1:
        raise UserError(f"workers.count = {workers}: must be at least 1")
    if cpus_per_worker < 1:
        raise UserError(f"workers.cpus = {cpus_per_worker}: must be at least 1")
    cpus = available_cpus()
    if workers * cpus_per_worker > cpus:
        raise UserError(
            f"workers.count = {workers} with workers.cpus = {cpus_per_worker}: needs "
            f"{workers * cpus_per_worker} CPUs, this machine has {cpus}; ask for fewer"
        )
    gpus = available_gpus() if gpus_per_worker else 0
    if workers * gpus_per_worker > gpus:
        raise UserError(
            f"workers.count = {workers} with workers.gpus = {gpus_per_worker:g}: needs "
            f"{workers * gpus_per_worker:g} GPUs, this machine has {gpus}; ask for fewer, or for 0"
        )


def warn_of_idle_gpus(gpus_per_worker: float) -> None:
    """Log a warning where workers get no GPU although this machine has some."""
    gpus = available_gpus() if gpus_per_worker == 0 else 0
    if gpus:
        _log.warning(
            "workers.gpus = 0: all work is done on CPUs, but this machine has %s; workers.gpus=1 "
            "gives each worker one",
            "a GPU" if gpus == 1 else f"{gpus} GPUs",
        )


def workers_here(least: int, most: int, cpus_per_worker: int, gpus_per_worker: float = 0) -> int:
    """Return how many workers have a place here, at most `most`; UserError below `least`."""
    check_machine(least, cpus_per_worker, gpus_per_worker)
    gpus = available_gpus() if gpus_per_worker else 0
    return min(most, places(available_cpus(), gpus, cpus_per_worker, gpus_per_worker))


def places(cpus: float, gpus: float, cpus_per_worker: int, gpus_per_worker: float) -> int:
    """Return how many workers have a place among so many CPUs and GPUs."""
    found = int(cpus // cpus_per_worker)
    # 0.3 / 0.1 is less than 3 in floating point.
    return min(found, int(gpus / gpus_per_worker + 1e-9)) if gpus_per_worker else found
