"""What the only rank of test_pinned_curve.py does."""

import itertools
from pathlib import Path

import torch
from ranks import OPTIMIZERS, make_loader
from tiny import TinyTask

from sbf_dist.train.engine import build_engine
from sbf_dist.train.loop import Every, LogRecord, fit
from sbf_dist.train.schedule import schedule
from sbf_dist.train.single import SingleEngine


def pinned_curves(_: Path) -> dict[str, list[float]]:
    """Losses that depend on all of a training: rates, clipping, decay, momentum, batch norm."""
    curves: dict[str, list[float]] = {}
    for optimizer, kind in itertools.product(("sgd", "adamw"), ("deepspeed", "single")):
        torch.manual_seed(3)
        task, settings = TinyTask(), OPTIMIZERS[optimizer]
        single = kind == "single"
        engine = (
            SingleEngine(task, settings) if single else build_engine(task, settings, micro_batch=16)
        )
        losses = curves[f"{kind} {optimizer}"] = []

        def note(record: LogRecord, losses: list[float] = losses) -> None:
            losses.append(record.parts["loss"])

        fit(
            engine,
            make_loader(),
            steps=12,
            lr_at=schedule("cosine", lr=0.05, steps=12, warmup=3),
            log=Every(1, note),
        )
    return curves
