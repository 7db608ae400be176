"""What the workers of Ray Train do, and what they and the driver say to each other.

Workers take one piece of work after another: to start them takes Ray Train, and what they import,
several seconds. Everything goes through Ray's key-value store: an actor would be one more process
of 80 MB. Ray's controller imports this module: it must not import torch, which costs a start three
seconds and 350 MB.
"""

import gc
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import cloudpickle, get_runtime_context, train
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_exists,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from launchers.on_ray import local_ray

if TYPE_CHECKING:
    import torch

_NAMESPACE = "sbf-dist"
_WARNINGS = "/warnings/"
_STOP = "/stop"
_STEPPING = "/stepping"
_NODES = "/nodes/"
_ANSWERS = "/answers/"
_WORK = "/given/"
_END = b"end"
_PACKAGES = ("launchers", "pipelines", "sbf_dist")
_POLL_SECONDS = 0.5
_WORK_POLL_SECONDS = 0.1  # of a worker that has nothing to do, at least
_POLLS_PER_SECOND = 200  # of all workers together

# Of the work that this process does.
_progress_key: str | None = None

Config = dict[str, Any]
Record = dict[str, Any]


# --- the driver ----------------------------------------------------------------------------------


def give(
    group: str, number: int, key: str, worker: Callable[[Config], Record | None], config: Config
) -> None:
    """Give the workers of a group the `number`-th piece of work, which is known by `key`."""
    work = {"key": key, "worker": worker, "config": config, "directory": str(Path.cwd())}
    # As bytes: Ray's controller would import all of the imports of the worker's module.
    _internal_kv_put(f"{group}{_WORK}{number}", cloudpickle.dumps(work), namespace=_NAMESPACE)


def give_end(group: str, number: int) -> None:
    """Let the workers of a group end instead of taking another piece of work."""
    _internal_kv_put(f"{group}{_WORK}{number}", _END, namespace=_NAMESPACE)


def answer(key: str, count: int) -> Record | None:
    """Return what rank 0 has answered, once all of `count` workers have; None before."""
    prefix = key + _ANSWERS
    if len(_internal_kv_list(prefix, namespace=_NAMESPACE)) < count:
        return None
    found: Record = json.loads(_internal_kv_get(f"{prefix}0", namespace=_NAMESPACE))
    return found


def forget(key: str) -> None:
    """Remove all that was said about a piece of work, or in a group."""
    _internal_kv_del(key, del_by_prefix=True, namespace=_NAMESPACE)


def is_stepping(key: str) -> bool:
    """Whether the work is a training that can be asked for an end."""
    return bool(_internal_kv_exists(key + _STEPPING, namespace=_NAMESPACE))


def ask_for_end(key: str) -> bool:
    """Ask a training for an end; whether it had not been asked before."""
    if _internal_kv_exists(key + _STOP, namespace=_NAMESPACE):
        return False
    _internal_kv_put(key + _STOP, b"", namespace=_NAMESPACE)
    return True


def nodes(key: str) -> set[str]:
    """Return the ids of the nodes on which workers are at the work."""
    prefix = key + _NODES
    found = _internal_kv_list(prefix, namespace=_NAMESPACE)
    return {name.decode().removeprefix(prefix) for name in found}


@contextmanager
def watch(
    key: str, on_progress: Callable[[Record], None] | None, on_warning: Callable[[str], None]
) -> Iterator[None]:
    """Bring what rank 0 reports to this process, from a thread, until the context ends.

    New records go to `on_progress`, new warnings to `on_warning`. What these raise while an error
    leaves the context is a note of that error.
    """
    ended = threading.Event()
    last: bytes | None = None
    seen: set[bytes] = set()

    def look() -> None:
        nonlocal last
        for warning in sorted(set(_internal_kv_list(key + _WARNINGS, namespace=_NAMESPACE)) - seen):
            seen.add(warning)
            on_warning(_internal_kv_get(warning, namespace=_NAMESPACE).decode())
        record = _internal_kv_get(key, namespace=_NAMESPACE)
        if record is not None and record != last and on_progress is not None:
            last = record
            on_progress(json.loads(record))

    def work() -> None:
        while not ended.wait(_POLL_SECONDS):
            if local_ray.dead_server() is None:
                look()

    thread = threading.Thread(target=work, name="progress", daemon=True)
    thread.start()

    def end() -> None:
        ended.set()
        if local_ray.dead_server() is None:  # which would have to answer
            thread.join()
            look()

    try:
        yield
    except BaseException as error:
        try:
            end()
        except Exception as late:
            error.add_note(f"its last progress could not be shown: {late!r}")
        raise
    end()


# --- the workers ---------------------------------------------------------------------------------


def work_until_the_end(given: Config) -> None:
    """Do what the driver of the group given["group"] gives, until it gives an end.

    What rank 0 returns, JSON-like, is the answer. What a worker raises ends the group.
    """
    global _progress_key  # noqa: PLW0603  one piece of work at a time in a process
    context = train.get_context()
    rank, pause = context.get_world_rank(), _pause(context.get_world_size())
    if rank == 0:
        logging.getLogger().addHandler(_WarningsForDriver())
    node = get_runtime_context().get_node_id()
    for number in itertools.count():
        work = _next_work(f"{given['group']}{_WORK}{number}", pause)
        if work is None:
            return
        _progress_key = work["key"]
        # Relative paths in a recipe, and the user's own modules, are the driver's; on another
        # machine they may lie on shared storage.
        if Path(work["directory"]).is_dir():
            os.chdir(work["directory"])
        _internal_kv_put(_progress_key + _NODES + node, b"", namespace=_NAMESPACE)
        found = work["worker"](work["config"]) or {}
        _give_memory_back()
        _internal_kv_put(
            f"{_progress_key}{_ANSWERS}{rank}",
            json.dumps(found if rank == 0 else {}),
            namespace=_NAMESPACE,
        )


def _next_work(key: str, pause: float) -> Config | None:
    while (found := _internal_kv_get(key, namespace=_NAMESPACE)) is None:
        time.sleep(pause)
    if found == _END:
        return None
    work: Config = cloudpickle.loads(found)
    return work


def _pause(count: int) -> float:
    """Seconds between looks for work of each of `count` workers: they ask one server."""
    return max(_WORK_POLL_SECONDS, count / _POLLS_PER_SECOND)


def _give_memory_back() -> None:
    """Let others have the memory that a piece of work has used."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class _WarningsForDriver(logging.Handler):
    """Keeps the warnings of our own packages where the driver finds them, in their order."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        if _progress_key is not None and record.name.partition(".")[0] in _PACKAGES:
            key = f"{_progress_key}{_WARNINGS}{time.time_ns()}"
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
