"""Where the time of training steps goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

HOST_PARTS = ("data", "checkpoint")  # that the loop waits for, whatever the device does meanwhile


class StepTimes:
    """Seconds of the parts of the steps since the last call of per_step(), on this rank.

    On a CPU a part takes until its call returns. On a GPU calls return before their work is done:
    there, parts lie between events of the stream, which are read when the times are asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens in this context as the part `name`."""
        if self._on_gpu and name not in HOST_PARTS:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - start)

    def per_step(self, steps: int) -> dict[str, float]:
        """Return the seconds of each part for each of so many steps, and begin anew.

        To be called once the device has been read, so that it waits for nothing more.
        """
        for name, begin, end in self._events:
            self._add(name, begin.elapsed_time(end) / 1000)
        found = {name: seconds / steps for name, seconds in self._seconds.items()}
        self._seconds, self._events = {}, []
        return found

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
