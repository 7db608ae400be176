"""A moving average of the weights of a training, which often generalises better than the last ones.

Polyak and Juditsky 1992; as used with decay 0.999 by FixMatch (Sohn et al. 2020). The average of a
parameter is kept as one more state of the optimizer: divided over the ranks as that is, and in
checkpoints.
"""

from typing import Any

import torch
from torch import Tensor

from sbf_dist.train.evaluate import synchronise_batchnorm
from sbf_dist.train.resharding import base_optimizer
from sbf_dist.train.shards import EMA


class WeightAverage:
    """Averages after each step of an engine: average = decay * average + (1 - decay) * weights.

    It begins with the weights after the first step, and leaves out steps that are left out.
    `buffers`: the averages of buffers of floating type by name, those of this rank until
    synchronise().
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.buffers: dict[str, Tensor] = {}
        self._followed = {
            name: buffer
            for name, buffer in engine.module.named_buffers()
            if buffer.is_floating_point()
        }
        self._engine = engine
        self._decay = decay
        self._last_step = -1
        base_optimizer(engine).register_step_post_hook(self._after_step)

    def synchronise(self) -> None:
        """Give every rank the averages of batch norm statistics of all ranks together."""
        if self.buffers:
            synchronise_batchnorm(self._engine.module, self.buffers)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        stepped = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        averages = [optimizer.state[p].get(EMA) for p in stepped]
        if not stepped:
            return
        if averages[0] is None:
            for parameter in stepped:
                optimizer.state[parameter][EMA] = parameter.detach().clone()
        else:
            torch._foreach_lerp_(averages, [p.detach() for p in stepped], 1 - self._decay)
        # At ZeRO stage 3 a step has a part for each group.
        if self._engine.global_steps != self._last_step:
            self._last_step = self._engine.global_steps
            self._average_buffers()

    def _average_buffers(self) -> None:
        if not self.buffers:
            self.buffers = {name: buffer.clone() for name, buffer in self._followed.items()}
        elif self._followed:
            own = [self.buffers[name] for name in self._followed]
            torch._foreach_lerp_(own, list(self._followed.values()), 1 - self._decay)
