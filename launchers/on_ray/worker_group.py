"""Workers of Ray Train that stay for one piece of work after another.

Ray Train starts the workers, joins them to a process group, polls them and ends them. It knows of
no checkpoint and makes no second attempt: what an attempt goes on from, and whether there is
another one, is decided in checkpoints.py and attempts.py.
"""

import itertools
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from ray import train
from ray.exceptions import RayError

from launchers.interruption import Interrupted, Notice
from launchers.on_ray import local_ray, ray_train
from launchers.on_ray.draining import draining_nodes
from launchers.on_ray.failures import (
    AttemptError,
    NoPlaceError,
    StoppedError,
    judged,
    judged_start,
)
from launchers.on_ray.local_ray import runs_locally
from launchers.on_ray.process_group import ProcessGroupConfig
from launchers.on_ray.ray_train import Config, Record
from launchers.on_ray.unused_services import trainer_class
from sbf_dist.errors import UserError
from sbf_dist.files import DISK_FAULTS
from sbf_dist.recipe import Workers

_POLL_SECONDS = 0.1
_LOOKS_PER_CHECK = 5
_END_SECONDS = 60.0  # for workers without work to end
_CUT_OFF_SECONDS = 10.0  # and for all others
_LEAVE_SECONDS = 10.0  # for the thread that waits in Ray's library
_CONTROLLER = "controller"
_WATCH_SECONDS = 2.0  # between looks at Ray's server while workers are idle
_FILES_OF_RAY = ".ray-train"

_log = logging.getLogger(__name__)


class ServerDiedError(Exception):
    """A server process of this program's own Ray has died, which must be started again."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class WorkerGroup:
    """`count` workers, joined to a process group; a worker that dies or raises ends all of them.

    storage  folder for what Ray writes of its own, removed at the end
    """

    def __init__(self, workers: Workers, count: int, storage: Path) -> None:
        self.count = count
        self._settings = workers
        self._key = uuid.uuid4().hex
        self._given = 0
        self._own_files = storage.absolute() / _FILES_OF_RAY
        self._outcome: futures.Future[Any] = futures.Future()
        self._leave = threading.Event()
        self._is_idle = False  # before the first work they may be starting still
        self.is_at_work = False
        # In the main thread Ray Train would take Ctrl-C for itself, and nothing else could be
        # noticed.
        self._thread = threading.Thread(
            target=self._fit, args=(self._trainer(),), name="ray-train", daemon=True
        )
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the workers live, as far as is known here."""
        return not self._outcome.done() and local_ray.dead_server() is None

    def give_first(self, worker: Callable[[Config], None], config: Config) -> None:
        """Let the workers do something, each for itself, before they are asked for anything."""
        ray_train.give(self._key, self._given, f"{self._key}/first", worker, config)
        self._given += 1

    def run(
        self,
        worker: Callable[[Config], Record | None],
        config: Config,
        *,
        notice: Notice,
        on_progress: Callable[[Record], None] | None = None,
    ) -> Record:
        """Run worker(config) on all ranks, once; what it returned on rank 0, JSON-like.

        Raises a worker's UserError, or OSError of a full disk, as it was; AttemptError;
        ServerDiedError; StoppedError where a machine of the workers is being taken away, and they
        have written a checkpoint and ended; and Interrupted where `notice` has noted a signal: once
        they have done the same, or are late, or do not train.
        """
        key = uuid.uuid4().hex
        ray_train.give(self._key, self._given, key, worker, config)
        self._given += 1
        self._is_idle, self.is_at_work = False, True
        try:
            with ray_train.watch(key, on_progress, lambda line: _log.warning("%s", line)):
                found = self._answer(key, notice)
            self._is_idle, self.is_at_work = True, False
            return found
        except (StoppedError, ServerDiedError, AttemptError):
            notice.raise_it()
            raise
        finally:
            if local_ray.dead_server() is None:
                ray_train.forget(key)

    def end(self) -> None:
        """Let the workers end, if they have no work; otherwise they are ended.

        Then no thread waits for them in Ray's library any more, but on versions of Ray that
        unused_services.py does not know: where one does, shutting Ray down may end this process by
        SIGSEGV, or leave the thread there for good.
        """
        if self.is_alive:
            if self._is_idle:
                ray_train.give_end(self._key, self._given)
                futures.wait([self._outcome], timeout=_END_SECONDS)
            else:
                self._cut_off()
            if local_ray.dead_server() is None:
                ray_train.forget(self._key)
            if self.is_alive:
                _log.warning("Ray Train has not ended in time: Ray is ended without it")
        self._leave.set()
        self._thread.join(_LEAVE_SECONDS)
        shutil.rmtree(self._own_files, ignore_errors=True)

    def _cut_off(self) -> None:
        """End workers that are starting, or at work, and wait for Ray Train to notice."""
        # Those of a cluster that have not begun yet find an end in the place of their work.
        ray_train.give_end(self._key, max(self._given - 1, 0))
        deadline = time.monotonic() + _CUT_OFF_SECONDS
        while self.is_alive and time.monotonic() < deadline:
            local_ray.end_train()
            futures.wait([self._outcome], timeout=_POLL_SECONDS)

    def _trainer(self) -> Any:
        workers = self._settings
        return trainer_class(on_one_machine=runs_locally(), leave=self._leave)(
            ray_train.work_until_the_end,
            train_loop_config={"group": self._key},
            torch_config=ProcessGroupConfig("nccl" if workers.gpus else "gloo"),
            scaling_config=train.ScalingConfig(
                num_workers=self.count,
                use_gpu=workers.gpus > 0,
                resources_per_worker=resources(workers),
            ),
            run_config=train.RunConfig(  # type: ignore[call-arg]
                name=self._key,
                storage_path=str(self._own_files),
                failure_config=train.FailureConfig(
                    max_failures=0,
                    controller_failure_limit=0,  # type: ignore[call-arg]
                    max_preemption_failures=0,
                ),
                worker_runtime_env={"env_vars": _worker_environment(workers)},
                logging_config=train.LoggingConfig(log_level="ERROR"),
            ),
        )

    def _fit(self, trainer: Any) -> None:
        try:
            with _environment_of_train(self._settings):
                result = trainer.fit()
        except BaseException as error:
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(result)

    def _answer(self, key: str, notice: Notice) -> Record:
        """Wait for the answer of all workers; what has ended them is raised."""
        for look in itertools.count():
            if futures.wait([self._outcome], timeout=_POLL_SECONDS).done:
                break
            if look % _LOOKS_PER_CHECK == 0:
                _check(key, notice, self._settings.stop_within)
            found = ray_train.answer(key, self.count)
            if found is not None:
                return found
        error = self._outcome.exception()
        assert error is not None, "the workers have ended without an answer"
        raise _cause(error) from None


class KeptWorkers:
    """The workers of a run, which stay for its next stage; a context that ends with them."""

    def __init__(self, settings: Workers) -> None:
        self.settings = settings
        self._group: WorkerGroup | None = None
        self._over = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="ray-server", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.end()

    def _watch(self) -> None:
        """Say that the GCS has died while no workers are at work, for which run() looks itself.

        Ray's library ends this process a minute later, in the middle of a stage and without a word.
        """
        while not self._over.wait(_WATCH_SECONDS):
            group = self._group
            # A Ray that is being started again has ended its raylet first.
            if local_ray.dead_servers() != [local_ray.GCS] or (group and group.is_at_work):
                continue
            _log.warning(
                "Ray's %s died: this run ends within a minute or at its next training; run the "
                "same command again to resume",
                local_ray.GCS,
            )
            return

    def group(self, count: int, storage: Path) -> WorkerGroup:
        """Return `count` workers that live: those that are here, or new ones.

        ServerDiedError where Ray's own server has died since, which new ones would wait for.
        """
        server = local_ray.dead_server()
        if server is not None:
            raise ServerDiedError(server)
        if self._group is not None and not (self._group.is_alive and self._group.count == count):
            self.end()
        if self._group is None:
            self._group = WorkerGroup(self.settings, count, storage)
        return self._group

    def end(self) -> None:
        """Let the workers end; those who ask for some next get new ones."""
        group, self._group = self._group, None
        if group is not None:
            group.end()


def _cause(error: BaseException) -> BaseException:
    """Return what to raise for an error of Ray Train."""
    if isinstance(error, train.WorkerGroupError):
        meant = (UserError, StoppedError)
        raised = (
            failure
            for failure in error.worker_failures.values()
            if isinstance(failure, meant) or getattr(failure, "errno", None) in DISK_FAULTS
        )
        return next(raised, None) or judged(error.worker_failures, str(error))
    if isinstance(error, train.ControllerError):
        return _cause_of_start(error)
    if isinstance(error, train.TrainingFailedError):
        return AttemptError(lost=True, cause="a machine was preempted", details=str(error))
    if isinstance(error, RayError):
        return _cause_of_controller(error)
    return error


def _cause_of_start(error: Any) -> AttemptError:
    if "StartupTimeout" in type(error.controller_failure).__name__:
        cause = "not all workers could be placed in time"
        return NoPlaceError(lost=True, cause=cause, details=str(error))
    return judged_start(error.controller_failure, str(error))


def _cause_of_controller(error: RayError) -> BaseException:
    if runs_locally():
        return ServerDiedError(local_ray.dead_server() or _CONTROLLER)
    return AttemptError(lost=True, cause=f"Ray Train's {_CONTROLLER} died", details=str(error))


def _check(key: str, notice: Notice, stop_within: float) -> None:
    """Raise ServerDiedError; pass a noted signal on to the workers; raise it if that takes long.

    That a machine of theirs will be taken away is passed on as well.
    """
    server = local_ray.dead_server()
    if server is not None:
        raise ServerDiedError(server)
    if notice.signum is None:
        _pass_draining_on(key)
        return
    if not ray_train.is_stepping(key):
        notice.raise_it()
    if ray_train.ask_for_end(key):
        _log.warning(
            "%s: writing a checkpoint at the next step (send it again to stop at once)",
            Interrupted(notice.signum),
        )
    if time.monotonic() - notice.since > stop_within:
        _log.warning("no checkpoint within %g s (workers.stop_within): stopping now", stop_within)
        notice.raise_it()


def _pass_draining_on(key: str) -> None:
    """Let workers that train write a checkpoint and end where a machine of theirs is drained."""
    if runs_locally():  # no machine of which will be taken away
        return
    draining = draining_nodes()
    if not draining:
        return
    leaving = ray_train.nodes(key) & draining.keys()
    if leaving and ray_train.is_stepping(key) and ray_train.ask_for_end(key):
        _log.warning(
            "%s is being preempted: writing a checkpoint at the next step",
            ", ".join(sorted(leaving)),
        )


def resources(workers: Workers) -> dict[str, float]:
    """Return what one worker needs, by Ray's names."""
    return {"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {})


def _worker_environment(workers: Workers) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(workers.cpus)}
    if not workers.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


@contextmanager
def _environment_of_train(workers: Workers) -> Iterator[None]:
    """Ray Train's switches, which it reads from the driver's environment."""
    switches = {
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(workers.hang_timeout),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(max(workers.start_timeout, 1)),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        # It would ask all workers alike, and each would have to ask at the same step: _check asks.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }
    missing = {k: v for k, v in switches.items() if k not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for switch in missing:
            os.environ.pop(switch, None)
