"""An engine for one process and one device, without DeepSpeed: many short trainings in a row."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from sbf_dist.settings import Optimizer
from sbf_dist.strided_convolutions import keep_inputs_contiguous
from sbf_dist.train.engine import torch_optimizer

Batch = dict[str, Tensor]


class SingleEngine:
    """What the training loop asks of an engine, around a task; single precision.

    It does what `build_engine` makes DeepSpeed do in one process: the same parameter groups,
    optimizer and clipping.
    """

    skip_bad_steps = 0

    def __init__(self, task: nn.Module, optimizer: Optimizer) -> None:
        self.device = next(task.parameters()).device
        self.optimizer = torch_optimizer(task, optimizer)
        self.module = task.train()
        keep_inputs_contiguous(task)
        self._clip = optimizer.clip

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        return self.module(batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradient_accumulation_steps(self) -> int:
        return 1

    def timed_communication(
        self, part: Callable[[], AbstractContextManager[None]]
    ) -> AbstractContextManager[None]:
        """There is nobody to exchange anything with."""
        return nullcontext()
