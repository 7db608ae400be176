"""What the ranks of test_bad_steps.py do."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import DIGESTS, make_engine, make_loader, train
from tiny import TinyLoader
from torch import Tensor

from sbf_dist.errors import UserError
from sbf_dist.train import checkpoint
from sbf_dist.train.loop import Every, LogRecord, fit
from sbf_dist.train.resharding import gather, optimized, state_of


def all_of_it(folder: Path) -> dict[str, Any]:
    return {
        "nan": loss_turns_nan_on_one_rank(),
        "left_out": bad_steps_are_left_out(),
        "gradient": a_gradient_is_bad_before_a_loss_is(),
        "refused": what_is_not_finite_is_not_saved(folder),
        "reads": reads_of_the_device(),
    }


class _NanOnRank1(TinyLoader):
    bad_steps = (3,)

    def __next__(self) -> dict[str, Tensor]:
        step = self.seen // (self.batch_size * self.world_size)
        batch = super().__next__()
        if self.rank == 1 and step in self.bad_steps:
            batch["image"][:] = float("nan")
        return batch


def loss_turns_nan_on_one_rank() -> dict[str, Any]:
    engine = make_engine()
    saved: list[int] = []
    try:
        train(
            engine,
            _NanOnRank1(dist.get_rank(), 2),
            0,
            20,
            checkpoint=Every(2, saved.append),
        )
    except UserError as error:
        return {"error": str(error), "saved": saved}
    return {"error": None, "saved": saved}


LEFT_OUT = ["zero 0 x 1", "zero 0 x 2", "zero 1 x 1", "zero 2 x 2", "zero 3 x 1"]


def bad_steps_are_left_out() -> dict[str, Any]:
    """NaN on rank 1 at step 3, at each ZeRO stage, without and with accumulation."""
    answer: dict[str, Any] = {}
    for name in LEFT_OUT:
        stage, accumulation = int(name[5]), int(name[-1])
        engine = make_engine(stage, accumulation=accumulation, skip_bad_steps=1)
        loader = _NanOnRank1(dist.get_rank(), 2)
        loader.bad_steps = (3 * accumulation + accumulation - 1,)  # the last of its batches
        digests, bad, left_out = [_digest(engine)], [], []

        def note(record: LogRecord, bad=bad, left_out=left_out) -> None:
            left_out.append(record.left_out)

        def saved(step: int, engine=engine, digests=digests) -> None:
            digests.append(_digest(engine))

        fit(
            engine,
            loader,
            steps=7,
            lr_at=lambda step: 0.05,
            log=Every(1, note),
            checkpoint=Every(1, saved),
        )
        pairs = itertools.pairwise(digests)
        weights = torch.cat([t.flatten() for t in gather(engine).values()])
        answer[name] = {
            "bad": [3],
            "unchanged": [step for step, (before, after) in enumerate(pairs) if before == after],
            "left_out": left_out[-1],
            "finite": all(t.isfinite().all() for t in engine.module.buffers()),
            "weights": weights,
        }
    engine = make_engine(skip_bad_steps=1)
    loader = _NanOnRank1(dist.get_rank(), 2)
    loader.bad_steps = (3, 5)
    try:
        train(engine, loader, 0, 8)
    except UserError as error:
        answer["error"] = str(error)
    return answer


def a_gradient_is_bad_before_a_loss_is() -> str | None:
    """At step 1 the loss is finite, its gradient is not; at step 2 the loss is NaN on rank 1."""
    engine = make_engine(1, skip_bad_steps=3)
    loader = _NanOnRank1(dist.get_rank(), 2)
    loader.bad_steps = (2,)

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * (float("inf") if engine.global_steps == 1 else 1.0)

    engine.module.student[5].weight.register_hook(spoil)
    try:
        fit(
            engine,
            loader,
            steps=6,
            lr_at=lambda step: 0.05,
            log=Every(4, lambda record: None),
        )
    except UserError as error:
        return str(error)
    return None


def _digest(engine: Any) -> str:
    """Of all that a step may change but counts: weights, momentum, batch norm statistics."""
    tensors = [*gather(engine).values(), *engine.module.buffers()]
    for part in optimized(engine):
        state = state_of(engine, part)
        tensors += [state[key] for key in sorted(state) if torch.is_tensor(state[key])]
    numbers = torch.cat([t.detach().double().flatten() for t in tensors])
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()


def what_is_not_finite_is_not_saved(folder: Path) -> dict[str, str]:
    answer = {}
    for what in ("parameter", "buffer", "state"):
        engine = make_engine()
        train(engine, make_loader(), 0, 2)
        spoilt = {
            "parameter": engine.module.student[5].weight,
            "buffer": engine.module.student[1].running_var,
            "state": next(iter(engine.optimizer.optimizer.state.values()))["momentum_buffer"],
        }[what]
        if dist.get_rank() == 1:
            with torch.no_grad():
                spoilt.flatten()[0] = float("inf")
        try:
            checkpoint.save(
                engine, folder / f"refused-{what}", step=7, loader_state={}, digests=DIGESTS
            )
        except UserError as error:
            answer[what] = str(error)
    return answer


def reads_of_the_device() -> dict[str, int]:
    """How often twelve steps with a record every four read a tensor, as a GPU would wait for."""
    counts = {}
    for stage in (0, 1, 2):
        engine = make_engine(stage, optimizer="unclipped")
        batches = list(itertools.islice(make_loader(), 12))
        with counted_reads() as count:
            fit(
                engine,
                batches,
                steps=12,
                lr_at=lambda step: 0.05,
                log=Every(4, lambda record: None),
            )
        counts[f"zero {stage}"] = len(count)
    return counts


@contextmanager
def counted_reads() -> Iterator[list[str]]:
    """Note each way from a tensor to a number of Python's."""
    found: list[str] = []
    names = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")
    before = {name: getattr(Tensor, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def read(tensor: Tensor, *arguments: Any) -> Any:
            found.append(name)
            with torch._C.DisableTorchFunctionSubclass():
                return before[name](tensor, *arguments)

        return read

    for name in names:
        setattr(Tensor, name, counting(name))
    try:
        yield found
    finally:
        for name in names:
            setattr(Tensor, name, before[name])
