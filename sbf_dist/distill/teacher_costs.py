"""What the answers of a teacher cost: time, and memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MAX_EVENTS = 64  # of the stream of a GPU, before they are read


@dataclass(frozen=True)
class TeacherCost:
    """Milliseconds per image on one worker; MB (10^6 bytes) of parameters and buffers.

    peak_mb  of a GPU's memory that a batch takes beside them; None on a CPU
    """

    ms_per_image: float
    parameters_mb: float
    peak_mb: float | None

    def __str__(self) -> str:
        peak = "" if self.peak_mb is None else f", {self.peak_mb:.0f} MB for a batch"
        return (
            f"{self.ms_per_image:.2f} ms per image, {self.parameters_mb:.3g} MB of parameters{peak}"
        )


class Meter:
    """Measures the forward passes of one teacher; the first is left out where there are others."""

    def __init__(self) -> None:
        self.images = 0
        self._seconds = 0.0
        self._first: tuple[int, float] | None = None
        self._peak: int | None = None
        self._events: list[tuple[int, Any, Any]] = []

    @contextmanager
    def measured(self, images: Tensor) -> Iterator[None]:
        """Count what happens in this context as an answer to `images`."""
        if images.device.type != "cuda":
            start = time.perf_counter()
            yield
            self._add(len(images), time.perf_counter() - start)
            return
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        peak = torch.cuda.max_memory_allocated(images.device) - before
        self._peak = max(peak, self._peak or 0)
        self.images += len(images)
        self._events.append((len(images), begin, end))
        if len(self._events) >= MAX_EVENTS:
            self._read_events()

    def cost(self, network: nn.Module) -> TeacherCost:
        """Return what has been measured. There must have been images."""
        self._read_events()
        images, seconds = self.images, self._seconds
        if self._first is not None and images > self._first[0]:
            images, seconds = images - self._first[0], seconds - self._first[1]
        tensors = [*network.parameters(), *network.buffers()]
        return TeacherCost(
            ms_per_image=round(1000 * seconds / images, 4),
            parameters_mb=round(sum(t.numel() * t.element_size() for t in tensors) / 1e6, 3),
            peak_mb=None if self._peak is None else round(self._peak / 1e6, 1),
        )

    def _read_events(self) -> None:
        for count, begin, end in self._events:
            end.synchronize()
            self.images -= count
            self._add(count, begin.elapsed_time(end) / 1000)
        self._events = []

    def _add(self, images: int, seconds: float) -> None:
        if self._first is None:
            self._first = (images, seconds)
        self.images += images
        self._seconds += seconds
