"""What the processes of test_changed_ranks.py do, for every ZeRO stage and optimizer in turn."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import TinyLoader, TinyTask

from sbf_dist.settings import Optimizer
from sbf_dist.train import checkpoint, shards
from sbf_dist.train.engine import build_engine
from sbf_dist.train.freezing import freeze
from sbf_dist.train.loop import Every, fit
from sbf_dist.train.resharding import gather

GLOBAL_BATCH = 24  # on 1, 2 and 3 ranks
STEPS = 3  # between two checkpoints
DIGESTS = {"recipe": "r1"}
OPTIMIZERS = {
    "sgd": Optimizer(lr=0.05, weight_decay=1e-3, clip=5.0),
    "adamw": Optimizer(name="adamw", lr=0.01, weight_decay=1e-3),
    "lamb": Optimizer(name="lamb", lr=0.01, weight_decay=1e-3),
    "finetuning-sgd": Optimizer(lr=0.05, weight_decay=1e-3, body_lr_share=0.5),
}
FROZEN = {"finetuning-sgd": ["0.bias", "1.*"]}
CELLS = [(stage, name) for stage in (0, 1, 2, 3) for name in ("sgd", "adamw")] + [(0, "lamb")]
CELLS += [(stage, "finetuning-sgd") for stage in (1, 3)]
EMA = 0.7

Losses = dict[str, list[float]]


def cell(stage: int, optimizer: str) -> str:
    return f"zero{stage}-{optimizer}"


def _engines() -> Iterator[tuple[str, Any, TinyLoader]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for stage, optimizer in CELLS:
        torch.manual_seed(7)
        task = TinyTask()
        freeze(task.student, FROZEN.get(optimizer, []))
        engine = build_engine(
            task,
            OPTIMIZERS[optimizer],
            micro_batch=GLOBAL_BATCH // ranks,
            zero_stage=stage,
            ema=EMA,
        )
        # In training mode its statistics are those of a rank's images: another number of ranks
        # would compute something else.
        engine.module.student[1].eval()
        engine.lr = OPTIMIZERS[optimizer].lr
        yield cell(stage, optimizer), engine, TinyLoader(rank, ranks, GLOBAL_BATCH // ranks)


def _train(engine: Any, loader: TinyLoader, start: int) -> list[float]:
    losses: list[float] = []
    averages = None
    if start:
        averages = {name: tensor.clone() for name, tensor in gather(engine, shards.EMA).items()}

    def follow(_: int) -> None:
        """The average by its definition, to compare with."""
        nonlocal averages
        weights = {name: weight.clone() for name, weight in gather(engine).items()}
        if averages is None:
            averages = weights
        for name, weight in weights.items():
            averages[name] = EMA * averages[name] + (1 - EMA) * weight

    fit(
        engine,
        loader,
        steps=start + STEPS,
        start_step=start,
        lr_at=lambda step: engine.lr,
        log=Every(1, lambda record: losses.append(record.parts["loss"])),
        checkpoint=Every(1, follow),
    )
    assert averages is not None
    for name, average in gather(engine, shards.EMA).items():
        torch.testing.assert_close(average, averages[name], rtol=0, atol=1e-6)
    return losses


def _save(engine: Any, loader: TinyLoader, folder: Path, step: int) -> None:
    state = loader.state_dict()
    checkpoint.save(engine, folder, step=step, loader_state=state, digests=DIGESTS)


def _go_on(folder: Path, source: str, target: str) -> Losses:
    """From folder/source/CELL, saved at once to …-again, to folder/target/CELL."""
    losses = {}
    for name, engine, loader in _engines():
        restored = checkpoint.load(engine, folder / source / name, digests=DIGESTS)
        loader.load_state_dict(restored.loader_state)
        again = folder / f"{source}-again-{dist.get_world_size()}" / name
        _save(engine, loader, again, restored.step)
        losses[name] = _train(engine, loader, restored.step)
        _save(engine, loader, folder / target / name, restored.step + STEPS)
    return losses


def without_a_change(folder: Path) -> Losses:
    """Two ranks, three times as many steps, with a checkpoint after the first third."""
    losses = {}
    for name, engine, loader in _engines():
        losses[name] = _train(engine, loader, 0)
        _save(engine, loader, folder / "two" / name, STEPS)
        losses[name] += _train(engine, loader, STEPS)
        _save(engine, loader, folder / "uninterrupted" / name, 2 * STEPS)
        losses[name] += _train(engine, loader, 2 * STEPS)
    return losses


def on_one(folder: Path) -> Losses:
    return _go_on(folder, "two", "two-one")


def on_three(folder: Path) -> Losses:
    return _go_on(folder, "two", "two-three")


def on_two_again(folder: Path) -> dict[str, Losses]:
    return {
        "two-two": _go_on(folder, "two", "two-two"),
        "two-one-two": _go_on(folder, "two-one", "two-one-two"),
        "two-three-two": _go_on(folder, "two-three", "two-three-two"),
    }
