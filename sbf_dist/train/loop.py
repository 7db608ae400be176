"""The training loop. It knows tensors and an engine: no launcher, no tracker, no data loader."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sbf_dist.errors import UserError
from sbf_dist.train.finite import LossWatch
from sbf_dist.train.step_times import StepTimes

Batch = dict[str, Tensor]
Argument = TypeVar("Argument")


class Engine(Protocol):
    """What the loop asks of an engine; a DeepSpeedEngine has it."""

    device: torch.device
    optimizer: Any  # has param_groups
    module: nn.Module
    skip_bad_steps: int  # how many steps may be left out because their loss is not finite

    def __call__(self, batch: Batch) -> dict[str, Tensor]: ...
    def backward(self, loss: Tensor) -> Any: ...
    def step(self) -> None: ...
    def gradient_accumulation_steps(self) -> int: ...
    def timed_communication(
        self, part: Callable[[], AbstractContextManager[None]]
    ) -> AbstractContextManager[None]: ...


class Teachers(Protocol):
    """Networks whose answers are added to batches."""

    def faults(self) -> Tensor:
        """Return, for each of them, whether an answer so far was not finite; on the device."""

    def refuse(self, faults: Sequence[bool]) -> None:
        """UserError that names the networks of which this is so."""


@dataclass(frozen=True)
class Annotation:
    """What adds to a batch, and the teachers whose answers it adds; None: they are stored."""

    add: Callable[[Batch], Batch]
    teachers: Teachers | None = None

    def __call__(self, batch: Batch) -> Batch:
        return self.add(batch)


@dataclass(frozen=True)
class LogRecord:
    """The training since the record before, over all ranks."""

    step: int  # steps done
    steps: int  # steps in all
    parts: dict[str, float]  # mean of each entry of the task's answer, "loss" first
    lr: float  # of the last step
    images_per_s: float  # over all ranks
    seconds_left: float  # at the speed since the record before
    left_out: int = 0  # steps so far whose loss was not finite, since the start or the last resume
    # Of a step on this rank, by part: waiting for data, targets (mixup, teachers), forward,
    # backward, optimizer, checkpoints. What ranks exchange in forward, backward and optimizer
    # (gradients; at ZeRO 3 weights as well) is part of them, and stands as communication besides.
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Every(Generic[Argument]):
    """What is called every so many steps and after the last one; None: after the last one alone."""

    steps: int | None
    call: Callable[[Argument], None]

    def __post_init__(self) -> None:
        assert self.steps is None or self.steps > 0, f"every {self.steps} steps"

    def is_due(self, done: int) -> bool:
        """Whether it is called after `done` steps, which are not the last."""
        return self.steps is not None and done % self.steps == 0


def fit(
    engine: Engine,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr_at: Callable[[int], float],
    log: Every[LogRecord],
    start_step: int = 0,
    checkpoint: Every[int] | None = None,
    annotate: Annotation | None = None,
) -> LogRecord | None:
    """Train from `start_step` to `steps` optimizer steps; the last record, None if none was left.

    A batch is a dict of tensors with "image" (b, …); its tensors are moved to the engine's device,
    `annotate` may add to it, and engine(batch) answers with "loss" and other named
    scalars. Step k, counted from 0, runs with the learning rate lr_at(k), times the "lr_scale" of a
    group that has one, and takes as many batches as the engine accumulates. `log` gets a record of
    the steps since the one before, `checkpoint` the number of steps done. Both are called on all
    ranks at the same step.

    The loop reads the device once a record (faults of teachers with it), and not between them.
    Where the engine may leave out steps whose loss is not finite, it reads it once a batch.

    UserError: the loss or an answer of a teacher is not finite (noticed at the next record, before
    the next checkpoint, and raised on all ranks alike), or `batches` ends too early.
    """
    stream = iter(batches)
    saved = start_step if start_step and checkpoint is not None else None
    watch = LossWatch(engine, checkpoint=saved)
    meter = _Meter(engine.device, None if annotate is None else annotate.teachers)
    times = StepTimes(engine.device)
    record = None
    with engine.timed_communication(lambda: times.part("communication")):
        for step in range(start_step, steps):
            lr = lr_at(step)
            for group in engine.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            watch.begin()
            for _ in range(engine.gradient_accumulation_steps()):
                with times.part("data"):
                    batch = _next_batch(stream, step, engine.device)
                if annotate is not None:
                    with times.part("targets"):
                        batch = annotate(batch)
                with times.part("forward"):
                    parts = engine(batch)
                    loss = watch.look(parts["loss"], batch.get("id"), step=step, lr=lr)
                with times.part("backward"):
                    engine.backward(loss)
                with times.part("optimizer"):
                    engine.step()  # counts; it steps once all gradients are there
                if not watch.is_bad:
                    meter.add(parts, images=len(batch["image"]), step=step)
            watch.end()
            done = step + 1
            saving = checkpoint is not None and (done == steps or checkpoint.is_due(done))
            if (done == steps or log.is_due(done) or saving) and meter.has_any:
                record = meter.record(watch, times, done, steps, lr)
                log.call(record)
            if checkpoint is not None and saving:
                with times.part("checkpoint"):
                    checkpoint.call(done)
                watch.checkpoint = done
                meter.restart_clock()
    return record


def _next_batch(stream: Iterator[Batch], step: int, device: torch.device) -> Batch:
    batch = next(stream, None)
    if batch is None:
        raise UserError(
            f"training data: ended at step {step}; the iterable of batches must not end"
        )
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


class _Meter:
    """Sums since the last record. They stay on the device: reading them would stall a GPU."""

    def __init__(self, device: torch.device, teachers: Teachers | None) -> None:
        self._device = device
        self._teachers = teachers
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._batches: dict[str, int] = {}  # that had a part of the name
        self._images = 0
        self._first_step: int | None = None
        self._since = time.monotonic()

    @property
    def has_any(self) -> bool:
        """Whether there was a batch since the last record; not where all steps were left out."""
        return bool(self._sums)

    def add(self, parts: dict[str, Tensor], *, images: int, step: int) -> None:
        names = ("loss", *(name for name in parts if name != "loss"))
        values = torch.stack([parts[name].detach().double().reshape(()) for name in names])
        # Batches of a training may differ in the parts that they have targets for.
        for name, value in zip(names, values.unbind(), strict=True):
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._batches[name] = self._batches.get(name, 0) + 1
        self._first_step = step if self._first_step is None else self._first_step
        self._images += images

    def restart_clock(self) -> None:
        """Leave what was done since the last record out of the speed."""
        self._since = time.monotonic()

    def record(
        self, watch: LossWatch, times: StepTimes, done: int, steps: int, lr: float
    ) -> LogRecord:
        """Means over the ranks since the last record. UserError if a number was not finite."""
        assert self._first_step is not None
        names = list(self._sums)
        # What the device knows comes in one message, and is read once.
        sums = torch.stack(list(self._sums.values()))
        counts = torch.tensor([*self._batches.values(), self._images], dtype=sums.dtype)
        counts = counts.to(self._device, non_blocking=True)
        faults = sums.new_empty(0) if self._teachers is None else self._teachers.faults().to(sums)
        totals = torch.cat([sums, counts, faults])
        first_bad = watch.first_bad(self._device)
        if dist.is_initialized():
            dist.all_reduce(totals)
            dist.all_reduce(first_bad, op=dist.ReduceOp.MIN)
        *found, bad = torch.cat([totals, first_bad.reshape(1)]).tolist()
        means, found = found[: len(names)], found[len(names) :]
        batches, images, faulty = found[: len(names)], found[len(names)], found[len(names) + 1 :]
        if self._teachers is not None and any(faulty):  # the reason, where the loss is NaN as well
            self._teachers.refuse([fault > 0 for fault in faulty])
        watch.check(bad)
        elapsed = time.monotonic() - self._since
        record = LogRecord(
            step=done,
            steps=steps,
            parts={
                name: value / count
                for name, value, count in zip(names, means, batches, strict=True)
            },
            lr=lr,
            images_per_s=images / elapsed,
            seconds_left=(steps - done) * elapsed / (done - self._first_step),
            left_out=watch.left_out,
            seconds=times.per_step(done - self._first_step),
        )
        self._reset()
        return record
