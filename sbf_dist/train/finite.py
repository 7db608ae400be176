"""Numbers that are not finite: losses of steps, and what a checkpoint would hold."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sbf_dist.errors import UserError
from sbf_dist.train.loss_scale import LEAST_SCALE, loss_scale
from sbf_dist.train.resharding import base_optimizer, named_parts, state_of

_IDS_SHOWN = 8
_ADVICE = (
    "lower the learning rate, lengthen the warm-up, clip the gradient or use a wider precision"
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Seen:
    """One backward pass since the last check; tensors stay on the device."""

    step: int
    lr: float
    finite: Tensor
    ids: Tensor | None


class LossWatch:
    """Watches the losses of a training, step by step: begin(), look() at each loss, end().

    engine.skip_bad_steps steps, from the start or the last resume on, may have a loss that is not
    finite; they are left out on all ranks. Above 0 the device is asked after each forward pass;
    otherwise check() finds such a step afterwards.
    """

    def __init__(self, engine: Any, *, checkpoint: int | None) -> None:
        self.left_out = 0
        self.is_bad = False  # the step that is under way
        self.checkpoint = checkpoint  # the last step that was saved
        self._engine = engine
        self._allowed: int = engine.skip_bad_steps
        self._seen: list[_Seen] = []
        self._skipped_before = self._skipped_by_engine()
        self._statistics: list[tuple[Tensor, Tensor]] = []
        if self._allowed:
            base_optimizer(engine).register_step_pre_hook(self._drop_gradients)

    def begin(self) -> None:
        """A step begins."""
        self.is_bad = False
        if self._allowed:  # a forward pass of NaN leaves NaN in batch norms
            self._statistics = [(b, b.clone()) for b in self._engine.module.buffers()]

    def look(self, loss: Tensor, ids: Tensor | None, *, step: int, lr: float) -> Tensor:
        """The loss to run back from: as it is, or NaN on all ranks where one's is not finite.

        Above ZeRO stage 0 DeepSpeed leaves out a step whose gradient is not finite; at stage 0 the
        optimizer is given nothing to step with.
        """
        self._seen.append(_Seen(step, lr, loss.detach().isfinite().all(), ids))
        if not self._allowed:
            return loss
        finite = self._seen[-1].finite.double()
        if dist.is_initialized():
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if finite.item():
            return loss
        self.is_bad = True
        return loss * float("nan")

    def end(self) -> None:
        """A step has ended. UserError: it was left out, and is one more than is allowed."""
        if not self.is_bad:
            return
        for buffer, before in self._statistics:
            buffer.copy_(before)
        self.left_out += 1
        step = self._seen[-1].step
        bad = self._describe(step)
        self._seen = [seen for seen in self._seen if seen.step != step]
        if self.left_out > self._allowed:
            raise UserError(
                f"{bad}; skip_bad_steps = {self._allowed} allows no more; {self._last()}; {_ADVICE}"
            )
        if not dist.is_initialized() or dist.get_rank() == 0:
            _log.warning("%s; its update is skipped (%d of %d)", bad, self.left_out, self._allowed)

    def first_bad(self, device: torch.device) -> Tensor:
        """The first step since the last check whose loss is not finite on this rank, or inf."""
        if not self._seen:  # the last steps were left out
            return torch.full((), torch.inf, dtype=torch.float64, device=device)
        steps = torch.tensor([seen.step for seen in self._seen], dtype=torch.float64)
        finite = torch.stack([seen.finite for seen in self._seen])
        steps = steps.to(device, non_blocking=True)
        return torch.where(finite, torch.inf, steps).min()

    def check(self, first_bad: float) -> None:
        """UserError: `first_bad`, of all ranks, is a step, or the engine left out others.

        Above ZeRO stage 0 DeepSpeed leaves out a step whose gradient is not finite, and says so
        nowhere. At fp16 that is no fault as long as a lower scale of the loss may help.
        """
        if first_bad != float("inf"):
            raise UserError(f"{self._describe(int(first_bad))}; {self._last()}; {_ADVICE}")
        skipped = self._skipped_by_engine()
        scale = loss_scale(self._engine)
        lost = skipped > self._skipped_before if scale is None else scale.get_scale() < LEAST_SCALE
        if lost:
            raise UserError(
                f"gradient: is not a finite number at a step from {self._seen[0].step} to "
                f"{self._seen[-1].step}; {self._last()}; {_ADVICE}"
            )
        self._skipped_before = skipped
        self._seen = []

    def _drop_gradients(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self.is_bad:
            optimizer.zero_grad(set_to_none=True)

    def _skipped_by_engine(self) -> int:
        return getattr(self._engine, "skipped_steps", 0) - self.left_out

    def _describe(self, step: int) -> str:
        """Step, rate and images; every rank calls it."""
        passes = [seen for seen in self._seen if seen.step == step]
        bad = [seen.ids for seen in passes if seen.ids is not None and not seen.finite.item()]
        own = torch.cat(bad).tolist() if bad else []
        per_rank: list[list[int]] = [own]
        if dist.is_initialized():
            per_rank = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(per_rank, own)
        ids = [number for rank in per_rank for number in rank]
        images = ""
        if ids:
            more = f", … ({len(ids)} in all)" if len(ids) > _IDS_SHOWN else ""
            images = f", images {', '.join(map(str, ids[:_IDS_SHOWN]))}{more}"
        return (
            f"loss: is not a finite number at step {step} "
            f"(learning rate {passes[0].lr:.3g}{images})"
        )

    def _last(self) -> str:
        if self.checkpoint is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is that of step {self.checkpoint}"


def refuse_non_finite(engine: Any) -> None:
    """UserError: a parameter, buffer or state of the optimizer is not finite on some rank.

    Every rank calls it, and all raise alike. It asks the device once.
    """
    entries = list(_entries(engine))
    flags = torch.stack([tensor.isfinite().all() for _, tensor in entries])
    everywhere = flags.all().double()
    if dist.is_initialized():
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    if everywhere.item():
        return
    own = next((name for (name, _), fine in zip(entries, flags, strict=True) if not fine), None)
    per_rank: list[str | None] = [own]
    if dist.is_initialized():
        per_rank = [None] * dist.get_world_size()
        dist.all_gather_object(per_rank, own)
    name = next(found for found in per_rank if found is not None)
    raise UserError(
        f"checkpoint at step {engine.global_steps}: {name} is not finite, so nothing is saved; "
        f"the previous checkpoint is kept; {_ADVICE}"
    )


def _entries(engine: Any) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in engine.module.state_dict().items():
        if tensor.is_floating_point():
            yield name, tensor
    for name, tensor in named_parts(engine):
        yield name, tensor.detach()
        for key, value in state_of(engine, tensor).items():
            if torch.is_tensor(value) and value.is_floating_point():
                yield f"{key} of {name}", value
