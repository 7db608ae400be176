"""What the ranks of test_loss_scale.py do: losses are scaled as at fp16, but computed in fp32."""

from pathlib import Path
from typing import Any

import ranks
import torch
import torch.distributed as dist
from tiny import Batch, TinyTask
from torch import Tensor

from sbf_dist.errors import UserError
from sbf_dist.train import checkpoint
from sbf_dist.train.engine import build_engine, set_loss_scale
from sbf_dist.train.loss_scale import loss_scale

STAGES = (1, 2, 3)


class _Spoiled(TinyTask):
    """While it is `spoiled`, the loss is a number and its gradient is not."""

    def __init__(self, spoiled: bool) -> None:
        super().__init__()
        self.spoiled = spoiled

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        parts = super().forward(batch)
        if self.spoiled:
            parts["loss"] = parts["loss"] + (0 * self.student[5].weight).sum().sqrt() * 0
        return parts


def _engine(stage: int, *, spoiled: bool = False) -> Any:
    torch.manual_seed(0)
    engine = build_engine(
        _Spoiled(spoiled), ranks.OPTIMIZERS["sgd"], micro_batch=16, zero_stage=stage
    )
    engine.scales_losses = True
    set_loss_scale(engine)
    return engine


def _weights(engine: Any) -> Tensor:
    state = ranks.whole_state(engine)
    return torch.cat([state[n].flatten() for n, _ in engine.module.named_parameters()])


def trained(folder: Path) -> dict[int, dict[str, Any]]:
    """Losses with and without a scale, and what becomes of a step that overflows."""
    found = {}
    for stage in STAGES:
        answer: dict[str, Any] = {
            "unscaled": ranks.train(_unscaled(stage), ranks.make_loader(), 0, 6)
        }
        engine, loader = _engine(stage), ranks.make_loader()
        answer["scaled"] = ranks.train(engine, loader, 0, 6)
        answer["scale"] = loss_scale(engine).get_scale()
        before = _weights(engine)
        engine.module.spoiled = dist.get_rank() == 0
        ranks.train(engine, loader, 6, 7)
        engine.module.spoiled = False
        answer["kept"] = torch.equal(before, _weights(engine))
        answer["after overflow"] = loss_scale(engine).get_scale()
        ranks.train(engine, loader, 7, 16)
        answer["moved"] = not torch.equal(before, _weights(engine))
        answer["weights"] = _weights(engine)
        answer["skipped"] = engine.skipped_steps
        checkpoint.save(
            engine, folder / f"stage {stage}", step=16, loader_state=loader.state_dict(), digests={}
        )
        answer["saved"] = loss_scale(engine).state_dict()
        found[stage] = answer
    return found


def restored(folder: Path) -> dict[int, dict[str, Any]]:
    found = {}
    for stage in STAGES:
        engine = _engine(stage)
        checkpoint.load(engine, folder / f"stage {stage}", digests={})
        found[stage] = loss_scale(engine).state_dict()
    return found


def _unscaled(stage: int) -> Any:
    torch.manual_seed(0)
    return build_engine(TinyTask(), ranks.OPTIMIZERS["sgd"], micro_batch=16, zero_stage=stage)


def without_end(_: Path) -> dict[int, str]:
    """What is said where no scale helps."""
    found = {}
    for stage in STAGES:
        try:
            ranks.train(_engine(stage, spoiled=True), ranks.make_loader(), 0, 40)
        except UserError as error:
            found[stage] = str(error)
    return found


def after_an_fp16_training(_: Path) -> dict[int, bool]:
    """Whether an fp32 training scales its losses after one at fp16 in the same process."""
    import deepspeed.runtime.torch_autocast as autocast

    autocast.TORCH_AUTOCAST_INITIALIZED = True
    autocast.TORCH_AUTOCAST_DTYPE = torch.float16
    engines = {stage: _unscaled(stage) for stage in STAGES}
    return {
        stage: engine.optimizer.torch_autocast_gradscaler is None and loss_scale(engine) is None
        for stage, engine in engines.items()
    }
