"""A training on workers that die: attempt after attempt, until it is done or the budget is used up.

Ray Train can make attempts of its own, and change the number of workers between them. It counts
failures over the whole training, however far it gets in between; it ends workers without a
checkpoint when it has more of them; and its controller dies with the raylet. So an attempt ends
with its workers, and this module decides on the next one.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.interruption import Notice, noted
from launchers.machine import available_cpus, available_gpus, places
from launchers.on_ray import held_places, local_ray
from launchers.on_ray.draining import staying_resources
from launchers.on_ray.failures import AttemptError, Budget, NoPlaceError, StoppedError
from launchers.on_ray.kept_logs import keep_logs
from launchers.on_ray.local_ray import runs_locally
from launchers.on_ray.ray_train import Config, Record
from launchers.on_ray.stored_checkpoints import shelf_at
from launchers.on_ray.worker_group import KeptWorkers, ServerDiedError, resources
from sbf_dist.errors import RunError, UserError
from sbf_dist.recipe import Workers

_POLL_SECONDS = 2.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How the driver follows what workers do.

    on_record  called from another thread with the newest record that rank 0 gave to progress()
    reached    says how far work without checkpoints is: failures are counted anew when that changes
    """

    on_record: Callable[[Record], None] | None = None
    reached: Callable[[], object] | None = None


_UNSEEN = Progress()


def run_workers(
    worker: Callable[[Config], Record | None],
    config: Config,
    *,
    name: str,
    storage: Path | str,
    logs: Path,
    kept: KeptWorkers,
    counts: Sequence[int] | None = None,
    progress: Progress = _UNSEEN,
) -> Record:
    """Run worker(config) on every rank of a torch process group; what it returned on rank 0.

    `config` and the answer are JSON-like. Ray must be initialised. `counts` are the numbers of
    workers that suit the training, of which the largest is taken that has a place; without them all
    in the range of workers.count do. The worker keeps its checkpoints in storage/name, a folder or
    an address in an object store, which it finds as config["checkpoints"]. When workers
    die or raise an error, all are started again, as often as workers.max_lost and max_failures say;
    what is known of that is kept in `logs`. Warnings that our own packages log on rank 0 are logged
    here. The workers are those of `kept`, and stay there.

    UserError: raised by a worker, as it was and without another try; too few workers have a
    place, or others use them. OSError: a disk is full, of a worker or of the logs.
    RunError: the budget is used up. Interrupted: a signal came, see launchers.interruption.
    """
    place = f"{storage}/{name}"
    workers = kept.settings
    budget = Budget(workers, progress.reached or shelf_at(place, "").names)
    files_of_ray = storage if isinstance(storage, Path) else logs.parent
    with noted() as notice:
        while True:
            numbers = counts or range(workers.least, workers.most + 1)
            count = _number_of_workers(workers, numbers, notice)
            began = time.time()
            try:
                return kept.group(count, files_of_ray).run(
                    worker,
                    config | {"checkpoints": place},
                    notice=notice,
                    on_progress=progress.on_record,
                )
            except ServerDiedError as died:
                failure = AttemptError(
                    lost=True, cause=f"Ray's {died.name} died", details=f"{died.name} died"
                )
                log = keep_logs(logs, name, failure, began)
                if died.name == local_ray.GCS:  # Ray's library ends a process that goes on
                    raise RunError(_given_up(name, failure, "", log)) from None
                again = budget.charge(failure)
                if again:
                    kept.end()
                    local_ray.restart()
            except StoppedError:
                failure = AttemptError(lost=True, cause="a machine is being preempted", details="")
                log = keep_logs(logs, name, failure, began)
                again = budget.charge(failure)
            except AttemptError as found:
                failure = found
                if not runs_locally():
                    held_places.give_back()
                    if isinstance(found, NoPlaceError):
                        _check_used_by_others(workers, count)
                log = keep_logs(logs, name, failure, began)
                local_ray.end_frozen_workers()
                again = budget.charge(failure)
            if not again:
                raise RunError(_given_up(name, failure, budget.described(failure), log))
            _log.warning(
                "%s: %s, %s; the workers' logs are in %s; restarting the workers",
                name,
                failure,
                budget.described(failure),
                log,
            )


def begin_workers(
    first: Callable[[Config], None],
    *,
    storage: Path,
    kept: KeptWorkers,
    counts: Sequence[int],
) -> None:
    """Let the workers of this machine's own Ray start that run_workers would take first.

    They begin with first({}). This returns at once; whatever goes wrong, run_workers will meet it.
    """
    count = _largest(kept.settings, counts)
    if count is not None:
        kept.group(count, storage).give_first(first, {})


def _given_up(name: str, failure: AttemptError, budget: str, log: Path) -> str:
    return (
        f"{name}: {failure}{budget and ', '}{budget}; the workers' logs are in {log}; run the "
        "same command again to resume from the last checkpoint"
    )


def _number_of_workers(workers: Workers, counts: Sequence[int], notice: Notice) -> int:
    """Return the largest of `counts` that has a place; waits until the least has one.

    An autoscaler is asked for the least. UserError after workers.start_timeout seconds, with
    what is there and what was asked.
    """
    notice.raise_it()
    count = _largest(workers, counts)
    if count is None and not runs_locally() and workers.start_timeout:
        _log.warning(
            "%s; waiting for %g s (workers.start_timeout)",
            _too_few(workers, counts),
            workers.start_timeout,
        )
        deadline = time.monotonic() + workers.start_timeout
        with held_places.asked_for(resources(workers), min(counts)):
            while count is None and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
                notice.raise_it()
                count = _largest(workers, counts)
    if count is None:
        raise UserError(_too_few(workers, counts))
    return count


def _largest(workers: Workers, counts: Sequence[int]) -> int | None:
    """Return the largest of `counts` that has a place now, used by others or not."""
    there = places(*_there(), workers.cpus, workers.gpus)
    return max((count for count in counts if count <= there), default=None)


def _too_few(workers: Workers, counts: Sequence[int]) -> str:
    cpus, gpus = _there()
    there = places(cpus, gpus, workers.cpus, workers.gpus)
    return (
        f"workers.count = {workers.count_as_written}: there are {cpus:g} CPUs and {gpus:g} GPUs, "
        f"enough for {there} workers with workers.cpus = {workers.cpus} and workers.gpus = "
        f"{workers.gpus:g}; at least {min(counts)} are needed"
    )


def _check_used_by_others(workers: Workers, count: int) -> None:
    """UserError if `count` workers found no place although the cluster has enough.

    Where it has not, a machine went away meanwhile, and another attempt takes fewer or waits.
    """
    cpus, gpus = _there()
    if count > places(cpus, gpus, workers.cpus, workers.gpus):
        return
    import ray

    free = ray.available_resources()
    raise UserError(
        f"workers.count = {workers.count_as_written}: no room for {count} workers within "
        f"{workers.start_timeout:g} s (workers.start_timeout): of {cpus:g} CPUs and {gpus:g} "
        f"GPUs, {free.get('CPU', 0):g} and {free.get('GPU', 0):g} are free; others use the rest"
    )


def _there() -> tuple[float, float]:
    """Return the CPUs and GPUs of the cluster, or of this machine."""
    if runs_locally():
        return available_cpus(), available_gpus()
    resources = staying_resources()
    return resources.get("CPU", 0), resources.get("GPU", 0)
