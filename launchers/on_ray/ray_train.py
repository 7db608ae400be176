"""One training on Ray Train: its workers, their restarts, checkpoints, progress and errors."""

import json
import logging
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import cloudpickle, train
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from launchers.on_ray.local_ray import runs_locally
from launchers.on_ray.process_group import ProcessGroupConfig
from launchers.on_ray.unused_services import trainer_class
from sbf_dist.errors import UserError
from sbf_dist.recipe import Workers

if TYPE_CHECKING:
    import torch

CHECKPOINTS_KEPT = 2
_NAMESPACE = "sbf-dist"
_WARNINGS = "/warnings/"
_PACKAGES = ("launchers", "pipelines", "sbf_dist")
_POLL_SECONDS = 0.5

_log = logging.getLogger(__name__)

# Of the training that this process is a worker of.
_progress_key: str | None = None

Config = dict[str, Any]
Record = dict[str, Any]


# --- the driver ----------------------------------------------------------------------------------


def run_workers(
    worker: Callable[[Config], Record | None],
    config: Config,
    *,
    name: str,
    storage: str | Path,
    workers: Workers,
    on_progress: Callable[[Record], None] | None = None,
) -> Record:
    """Run worker(config) on every rank of a torch process group; what it returned on rank 0.

    `config` and the answer are JSON-like. Ray must be initialised. Checkpoints are kept under
    storage/name, and a training of the same name and storage goes on from the last of them. When a
    worker dies or raises, all are started again from the last checkpoint, `workers.max_failures`
    times. `on_progress` is called from another thread with the newest record that rank 0 gave to
    progress(). Warnings that our own packages log on rank 0 are logged here.

    UserError: raised by a worker, as it was and without another try. RuntimeError: a worker failed
    too often; the message ends with its traceback.
    """
    key = uuid.uuid4().hex
    # The worker travels as bytes: Ray's controller would import all of its module's imports.
    work = {
        "worker": cloudpickle.dumps(worker),
        "config": config,
        "progress_key": key,
        "directory": str(Path.cwd()),
    }
    trainer = trainer_class(on_one_machine=runs_locally())(
        _run_worker,
        train_loop_config=work,
        torch_config=ProcessGroupConfig("nccl" if workers.gpus else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker=_resources(workers),
        ),
        run_config=train.RunConfig(  # type: ignore[call-arg]
            name=name,
            storage_path=str(storage.absolute() if isinstance(storage, Path) else storage),
            failure_config=train.FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=train.CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            callbacks=[_StopAtUserError()],  # type: ignore[list-item]
            worker_runtime_env={"env_vars": _worker_environment(workers)},
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    )
    with _environment_of_train(), _own_interrupt(), _watch(key, on_progress):
        try:
            result = trainer.fit()
        except SystemExit as error:
            # Ray Train's handler of Ctrl-C stops the workers and then leaves with status 0.
            raise KeyboardInterrupt from error
        except train.ControllerError as error:
            if isinstance(error.controller_failure, UserError):
                raise error.controller_failure from None
            raise
        except train.WorkerGroupError as error:
            raise RuntimeError(f"training {name}: {error}") from error
    return dict(result.return_value or {})


class _StopAtUserError(train.UserCallback):
    """Lets a worker's UserError end the training: an error of a callback is not tried again."""

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, UserError):
                raise error


def _resources(workers: Workers) -> dict[str, float]:
    return {"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {})


def _worker_environment(workers: Workers) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(workers.cpus)}
    if not workers.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


@contextmanager
def _environment_of_train() -> Iterator[None]:
    """Ray Train's switches, which it reads from the driver's environment."""
    switches = {
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    if runs_locally():  # no node of which will be taken away
        switches["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    missing = {k: v for k, v in switches.items() if k not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for switch in missing:
            os.environ.pop(switch, None)


@contextmanager
def _own_interrupt() -> Iterator[None]:
    """Ray Train sets a handler of Ctrl-C and leaves it there: put the one before it back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
            look()

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
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
    assert _progress_key is not None, "progress() is for workers of run_workers"
    if train.get_context().get_world_rank() == 0:
        _internal_kv_put(
            _progress_key, json.dumps(dict(record)), overwrite=True, namespace=_NAMESPACE
        )


@contextmanager
def latest_checkpoint() -> Iterator[Path | None]:
    """The folder of the checkpoint to go on from, while the context lasts; None at the start."""
    checkpoint = train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def report(metrics: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    """Make a checkpoint of what write(folder) of every rank puts into a folder of its own.

    The folders are merged, so their files need different names. Every rank calls it equally often
    and waits for the others. The files are in the storage when it returns; Ray's controller takes
    note of them at its next look at the workers, half a second later.
    """
    with tempfile.TemporaryDirectory(prefix="sbf-checkpoint-") as folder:
        write(Path(folder))
        train.report(dict(metrics), checkpoint=train.Checkpoint.from_directory(folder))
