"""Ending a training in good order, and noticing one that hangs; on every rank of a worker group.

The driver asks for an end by a key in Ray's key-value store. Rank 0 sees it within a second and the
ranks agree on the step: each votes after each step, by a sum of one number that is under way while
the next step is computed, so that it costs a GPU no synchronisation.
"""

import faulthandler
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

_POLL_SECONDS = 0.5
_REARM_SECONDS = 1.0


class Stopping:
    """Counts the steps of a training; says after each whether all ranks are to end.

    listening     gives, on rank 0, a function that says whether the driver asks for an end
    hang_timeout  seconds without a step after which this process writes where its threads are to
                  `stacks` and ends
    """

    def __init__(
        self,
        listening: AbstractContextManager[Callable[[], bool]],
        hang_timeout: float,
        stacks: Path,
    ) -> None:
        self._listening = listening
        self.ending = False
        self._seen = threading.Event()
        self._over = threading.Event()
        self._vote: tuple[torch.Tensor, Any] | None = None
        self._group: Any = dist.new_group(backend="gloo")
        self._timeout = hang_timeout
        self._stacks = stacks
        self._armed = float("-inf")
        self._file: Any = None

    def __enter__(self) -> Self:
        if dist.get_rank() == 0:
            asked = self._listening.__enter__()
            self._thread = threading.Thread(target=self._look, args=[asked], daemon=True)
            self._thread.start()
        return self

    def after_step(self) -> bool:
        """Note that a step is done; whether to end after it. Every rank calls it at each step.

        The answer is that of the votes after the step before: the same on all ranks.
        """
        self._rearm()
        self.ending = self._counted()
        mine = torch.tensor([int(self._seen.is_set())])
        self._vote = (mine, dist.all_reduce(mine, group=self._group, async_op=True))
        return self.ending

    def _counted(self) -> bool:
        if self._vote is None:
            return False
        (total, work), self._vote = self._vote, None
        work.wait()
        return bool(total.item())

    def pause(self) -> None:
        """Let what comes now take its time, until the next step is done."""
        faulthandler.cancel_dump_traceback_later()
        self._armed = float("-inf")

    def _look(self, asked: Callable[[], bool]) -> None:
        while not self._over.wait(_POLL_SECONDS):
            if asked():
                self._seen.set()
                return

    def _rearm(self) -> None:
        now = time.monotonic()
        if now - self._armed < _REARM_SECONDS:
            return
        self._armed = now
        if self._file is None:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._stacks.open("w")
        faulthandler.dump_traceback_later(self._timeout, exit=True, file=self._file)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if dist.get_rank() == 0:
            self._over.set()
            self._thread.join()
            self._listening.__exit__(None, None, None)
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            self._stacks.unlink(missing_ok=True)  # nothing hung
        if kind is None:
            self._counted()
            dist.destroy_process_group(self._group)
