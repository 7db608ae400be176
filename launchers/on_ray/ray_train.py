"""One attempt at a training on Ray Train's workers; and what a worker tells the driver.

Ray Train starts the workers, joins them to a process group, polls them and ends them. It knows of
no checkpoint and makes no second attempt: what an attempt goes on from, and whether there is
another one, is decided in checkpoints.py and attempts.py. Ray's controller imports this module: it
must not import torch, which costs a start three seconds and 350 MB.
"""

import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import cloudpickle, get_runtime_context, train
from ray.exceptions import RayError
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_exists,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from launchers.interruption import Interrupted, Notice
from launchers.on_ray import local_ray
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
from launchers.on_ray.unused_services import trainer_class
from sbf_dist.errors import UserError
from sbf_dist.recipe import Workers

if TYPE_CHECKING:
    import torch

_NAMESPACE = "sbf-dist"
_WARNINGS = "/warnings/"
_STOP = "/stop"
_STEPPING = "/stepping"
_NODES = "/nodes/"
_PACKAGES = ("launchers", "pipelines", "sbf_dist")
_POLL_SECONDS = 0.5
_CONTROLLER = "controller"
_FILES_OF_RAY = ".ray-train"

_log = logging.getLogger(__name__)

# Of the training that this process is a worker of.
_progress_key: str | None = None

Config = dict[str, Any]
Record = dict[str, Any]


class ServerDiedError(Exception):
    """A server process of this program's own Ray has died, which must be started again."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


# --- the driver ----------------------------------------------------------------------------------


def attempt(
    worker: Callable[[Config], Record | None],
    config: Config,
    *,
    storage: Path,
    workers: Workers,
    count: int,
    notice: Notice,
    on_progress: Callable[[Record], None] | None = None,
) -> Record:
    """Run worker(config) on `count` ranks of a process group, once; what it returned on rank 0.

    Raises the UserError of a worker as it was; AttemptError; ServerDiedError; StoppedError where a
    machine of the workers is being taken away, and they have written a checkpoint and ended; and
    Interrupted where `notice` has noted a signal: once they have done the same, or are late, or do
    not train.
    """
    key = uuid.uuid4().hex
    # The worker travels as bytes: Ray's controller would import all of its module's imports.
    work = {
        "worker": cloudpickle.dumps(worker),
        "config": config,
        "progress_key": key,
        "directory": str(Path.cwd()),
    }
    own_files = storage.absolute() / _FILES_OF_RAY
    trainer = trainer_class(on_one_machine=runs_locally())(
        _run_worker,
        train_loop_config=work,
        torch_config=ProcessGroupConfig("nccl" if workers.gpus else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=count,
            use_gpu=workers.gpus > 0,
            resources_per_worker=resources(workers),
        ),
        run_config=train.RunConfig(  # type: ignore[call-arg]
            name=key,
            storage_path=str(own_files),
            failure_config=train.FailureConfig(
                max_failures=0,
                controller_failure_limit=0,  # type: ignore[call-arg]
                max_preemption_failures=0,
            ),
            worker_runtime_env={"env_vars": _worker_environment(workers)},
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        with _environment_of_train(workers), _watch(key, on_progress):
            result = _fitted(trainer, lambda: _check(key, notice, workers.stop_within))
    except (StoppedError, ServerDiedError, AttemptError):
        notice.raise_it()
        raise
    finally:
        shutil.rmtree(own_files, ignore_errors=True)
    return dict(result.return_value or {})


def _fitted(trainer: Any, check: Callable[[], None]) -> Any:
    """Return the result of trainer.fit(), which runs in a thread, while check() is called here.

    In the main thread Ray Train would take Ctrl-C for itself, and nothing else could be noticed.
    """
    outcome: futures.Future[Any] = futures.Future()

    def fit() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=fit, name="ray-train", daemon=True).start()
    while not futures.wait([outcome], timeout=_POLL_SECONDS).done:
        check()
    error = outcome.exception()
    if error is not None:
        _raise_judged(error)
    return outcome.result()


def _raise_judged(error: BaseException) -> None:
    if isinstance(error, train.WorkerGroupError):
        for failure in error.worker_failures.values():
            if isinstance(failure, UserError | StoppedError):
                raise failure from None
        raise judged(error.worker_failures, str(error)) from None
    if isinstance(error, train.ControllerError):
        if "StartupTimeout" in type(error.controller_failure).__name__:
            raise NoPlaceError(
                lost=True, cause="not all workers had a place in time", details=str(error)
            ) from None
        raise judged_start(error.controller_failure, str(error)) from None
    if isinstance(error, train.TrainingFailedError):
        raise AttemptError(
            lost=True, cause="a machine was taken away", details=str(error)
        ) from None
    if isinstance(error, RayError):
        if runs_locally():
            raise ServerDiedError(local_ray.dead_server() or _CONTROLLER) from None
        raise AttemptError(
            lost=True, cause=f"Ray Train's {_CONTROLLER} died", details=str(error)
        ) from None
    raise error


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
    if not _internal_kv_exists(key + _STEPPING, namespace=_NAMESPACE):
        notice.raise_it()
    if not _internal_kv_exists(key + _STOP, namespace=_NAMESPACE):
        _internal_kv_put(key + _STOP, b"", namespace=_NAMESPACE)
        _log.warning(
            "%s: a checkpoint is written at the next step (once more: end at once)",
            Interrupted(notice.signum),
        )
    if time.monotonic() - notice.since > stop_within:
        _log.warning("no checkpoint within %g s (workers.stop_within): ending now", stop_within)
        notice.raise_it()


def _pass_draining_on(key: str) -> None:
    """Let workers that train write a checkpoint and end where a machine of theirs is drained."""
    if runs_locally():  # no machine of which will be taken away
        return
    draining = draining_nodes()
    if not draining:
        return
    prefix = key + _NODES
    own = {
        found.decode().removeprefix(prefix)
        for found in _internal_kv_list(prefix, namespace=_NAMESPACE)
    }
    leaving = own & draining.keys()
    if not leaving or not _internal_kv_exists(key + _STEPPING, namespace=_NAMESPACE):
        return
    if not _internal_kv_exists(key + _STOP, namespace=_NAMESPACE):
        _internal_kv_put(key + _STOP, b"", namespace=_NAMESPACE)
        _log.warning(
            "%s is being taken away: a checkpoint is written at the next step",
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


@contextmanager
def _watch(key: str, on_progress: Callable[[Record], None] | None) -> Iterator[None]:
    """Bring what rank 0 reports to this process, from a thread, until the context ends.

    New records under `key` go to `on_progress`, new warnings to this module's log. They come
    through Ray's key-value store: an actor would be one more process of 80 MB.
    """
    ended = threading.Event()
    last: bytes | None = None
    seen: set[bytes] = set()

    def look() -> None:
        nonlocal last
        for warning in sorted(set(_internal_kv_list(key + _WARNINGS, namespace=_NAMESPACE)) - seen):
            seen.add(warning)
            _log.warning("%s", _internal_kv_get(warning, namespace=_NAMESPACE).decode())
        record = _internal_kv_get(key, namespace=_NAMESPACE)
        if record is not None and record != last and on_progress is not None:
            last = record
            on_progress(json.loads(record))

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            if local_ray.dead_server() is None:
                look()

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    except ServerDiedError:  # which would have to answer
        ended.set()
        raise
    finally:
        if not ended.is_set():
            ended.set()
            thread.join()
            look()
            _internal_kv_del(key, del_by_prefix=True, namespace=_NAMESPACE)


# --- the workers ---------------------------------------------------------------------------------


def _run_worker(given: Config) -> Record | None:
    global _progress_key  # noqa: PLW0603  one training per process, as Ray Train's own context
    _progress_key = given["progress_key"]
    # Relative paths in a recipe, and the user's own modules, are the driver's; on another machine
    # they may lie on shared storage.
    if Path(given["directory"]).is_dir():
        os.chdir(given["directory"])
    node = get_runtime_context().get_node_id()
    _internal_kv_put(_progress_key + _NODES + node, b"", namespace=_NAMESPACE)
    if train.get_context().get_world_rank() == 0:
        logging.getLogger().addHandler(_WarningsForDriver(_progress_key + _WARNINGS))
    return cloudpickle.loads(given["worker"])(given["config"])


class _WarningsForDriver(logging.Handler):
    """Keeps the warnings of our own packages where the driver finds them, in their order."""

    def __init__(self, key: str) -> None:
        super().__init__(logging.WARNING)
        self._key = key

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] in _PACKAGES:
            key = f"{self._key}{time.time_ns()}"
            _internal_kv_put(key, record.getMessage(), overwrite=True, namespace=_NAMESPACE)


@dataclass(frozen=True)
class Place:
    """Where a worker stands among all workers, and the device that it computes on.

    local_rank  among the workers of its node
    node_rank   of its node among all nodes
    """

    rank: int
    world_size: int
    device: "torch.device"
    local_rank: int
    node_rank: int


def place() -> Place:
    """Return where this worker stands."""
    from ray.train.torch import get_device

    context = train.get_context()
    return Place(
        context.get_world_rank(),
        context.get_world_size(),
        get_device(),
        context.get_local_rank(),
        context.get_node_rank(),
    )


def progress(record: Mapping[str, Any]) -> None:
    """Show `record` (JSON) to the driver's on_progress; only rank 0's is shown, the newest wins."""
    key = _key()
    if train.get_context().get_world_rank() == 0:
        _internal_kv_put(key, json.dumps(dict(record)), overwrite=True, namespace=_NAMESPACE)


@contextmanager
def listening() -> Iterator[Callable[[], bool]]:
    """On rank 0: tell the driver that a training can be asked for an end, while the context lasts.

    Gives the function that says whether it is asked.
    """
    key = _key()
    _internal_kv_put(key + _STEPPING, b"", namespace=_NAMESPACE)
    try:
        yield lambda: bool(_internal_kv_exists(key + _STOP, namespace=_NAMESPACE))
    finally:
        _internal_kv_del(key + _STEPPING, namespace=_NAMESPACE)


def _key() -> str:
    assert _progress_key is not None, "this is for workers of a training"
    return _progress_key
