"""Checkpoints that are written while a training goes on, on every rank of a worker group.

What is done when: the engine's state is written to a folder of this machine while the training
waits, because DeepSpeed's writer needs the engine idle. After that the training goes on, and a
thread hashes the files, moves them to the run's folder, waits until the disk has them, and writes
the manifest. At most one checkpoint is in flight; the next one waits for it.
"""

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch.distributed as dist

from launchers.on_ray.checkpoints import Shelf
from launchers.on_ray.failures import StoppedError
from launchers.on_ray.stopping import Stopping
from launchers.on_ray.stored_checkpoints import StoredShelf
from sbf_dist.errors import RunError, UserError
from sbf_dist.files import DISK_FAULTS
from sbf_dist.train import checkpoint
from sbf_dist.train.loop import Every

PREFIX = "sbf-checkpoint-"
_DISK = DISK_FAULTS | {
    errno.EFBIG: "the file would be larger than the system allows",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk reports an error",
}
_PROBE_BYTES = 2**20

Answer = TypeVar("Answer")


class Saving:
    """The checkpoints of one training, of which `resume` is the one to go on from, if any.

    All ranks make it, use it and leave its context together. `stopping` ends the training early.
    """

    def __init__(self, shelf: Shelf | StoredShelf, stopping: Stopping) -> None:
        self._shelf = shelf
        self._stopping = stopping
        self._group = dist.new_group(backend="gloo")  # the thread's own, beside the training's
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None
        found, self._token = decided_by_rank_0(lambda: _opened(shelf), self._group)
        self.resume = None if found is None else shelf.here(found)

    def every(self, steps: int, save: Callable[[int], None]) -> Every[int]:
        """Return when save(steps done), which calls `save` of this object, is called by the loop.

        That is every so many steps, after the last one, and when the training is asked to end:
        then the loop ends with StoppedError, once the checkpoint is written.
        """

        def call(done: int) -> None:
            self._stopping.pause()
            save(done)
            if self._stopping.ending:
                self.wait()
                raise StoppedError

        return _Times(steps, call, self._stopping)

    @property
    def ending(self) -> bool:
        """Whether the training is asked to end: it has little time for a last checkpoint."""
        return self._stopping.ending

    def save(
        self,
        engine: Any,
        *,
        step: int,
        loader_state: Mapping[str, Any],
        digests: Mapping[str, str],
        top1: float | None = None,
    ) -> None:
        """Make a checkpoint; when it returns, the training may go on while it is written.

        `digests` must hold the name of the training under "training". UserError: the disk does not
        take it, or did not take the one before.
        """
        self.wait()
        own = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            checkpoint.write_rank(engine, own, loader_state=loader_state)
        except (OSError, RuntimeError) as error:  # PyTorch's writer raises RuntimeError
            try:
                _explain(error, own, step)
            finally:
                shutil.rmtree(own, ignore_errors=True)
            raise
        self._in_flight = self._thread.submit(self._publish, own, step, dict(digests), top1)

    def wait(self) -> None:
        """Wait until no checkpoint is in flight; raises what went wrong with it."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def _publish(self, own: Path, step: int, digests: dict[str, str], top1: float | None) -> None:
        try:
            self._shelf.write(
                own,
                step=step,
                token=self._token,
                digests=digests,
                group=self._group,
                top1=top1,
            )
        except OSError as error:
            _explain(error, self._shelf.folder, step)
            raise
        finally:
            shutil.rmtree(own, ignore_errors=True)

    def __enter__(self) -> Self:
        self._stopping.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.__exit__(kind, error, trace)
        if kind is None:
            self.wait()
            self._thread.shutdown()
            dist.destroy_process_group(self._group)
        else:  # the other ranks may be gone: nothing that waits for them
            self._thread.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class _Times(Every[int]):
    stopping: Stopping

    def is_due(self, done: int) -> bool:
        # The loop asks after every step but the last.
        ending = self.stopping.after_step()
        return ending or super().is_due(done)


def decided_by_rank_0(decide: Callable[[], Answer], group: Any) -> Answer:
    """Return decide() of rank 0 on every rank, or raise there what it raised."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = decide()
        except (UserError, RunError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _opened(shelf: Shelf | StoredShelf) -> tuple[Any, str]:
    try:
        shelf.tidy()
        return shelf.newest_whole(), secrets.token_hex(4)
    except OSError as error:
        raise UserError(f"checkpoints {shelf.folder}: {error.strerror}") from error


def _explain(error: Exception, folder: Path, step: int) -> None:
    """Raise a UserError for `error` where the disk of `folder` is its cause."""
    number = error.errno if isinstance(error, OSError) else _trouble_with(folder)
    if number in _DISK:
        raise UserError(
            f"checkpoint of step {step} in {folder}: {_DISK[number]}; the previous checkpoint is "
            "intact; free some space or choose another place, and run the same command again"
        ) from error


def _trouble_with(folder: Path) -> int | None:
    """Return the number of the error that writing a file into `folder` ends with; None if none."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None
