"""The memory that a training takes on each GPU, computed and traced, without one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten

from sbf_dist.surgery import deep_copy, in_eval_mode
from sbf_dist.train.engine import Precision

FLOAT_BYTES = 4  # of a number in fp32, which weights, gradients and the optimizer are kept in
PERSISTENT = 100_000  # numbers: DeepSpeed's stage3_param_persistence_threshold
STATES = {"sgd": 1, "adamw": 2, "lamb": 2}  # numbers of the optimizer for each parameter
_TRACED_IMAGES = (2, 4)  # batch norm refuses one value per channel
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int = 0
    teachers: int = 0

    @property
    def total(self) -> int:
        """All of it; what the libraries take for themselves comes on top."""
        kept = self.weights + self.gradients + self.optimizer
        return kept + self.activations + self.teachers


def state_memory(
    stage: int, optimizer: str, sizes: Sequence[int], ranks: int, *, averaged: bool = False
) -> Memory:
    """Compute what a rank keeps, at a ZeRO stage, of parameters of so many numbers each.

    Stages 1 to 3 hold a rank's part of the weights twice, as the network and as what the optimizer
    steps; stage 3 holds small parameters whole besides. benchmarks/zero_memory.py measures it.
    With `averaged`, a moving average of the weights is divided as the optimizer's state is, and
    counted with it.
    """
    whole = FLOAT_BYTES * sum(sizes)
    part = math.ceil(whole / ranks)
    small = FLOAT_BYTES * sum(size for size in sizes if size < PERSISTENT)
    weights = {0: whole, 1: whole + part, 2: whole + part, 3: 2 * part + small}[stage]
    kept = whole if stage == 0 else part
    return Memory(weights=weights, gradients=kept, optimizer=(STATES[optimizer] + averaged) * kept)


def activation_bytes(
    model: nn.Module, input_shape: tuple[int, ...], images: int, precision: Precision
) -> int:
    """Trace what a training's forward pass keeps for the backward pass, for so many images.

    Nothing is computed. Tensors that share memory count once, parameters not at all; what is there
    once for any number of images, such as weights in lower precision, is found by tracing two
    numbers of images.
    """
    few, more = (_kept_bytes(model, input_shape, n, precision) for n in _TRACED_IMAGES)
    per_image = (more - few) / (_TRACED_IMAGES[1] - _TRACED_IMAGES[0])
    return round(few + per_image * (images - _TRACED_IMAGES[0]))


def frozen_bytes(
    model: nn.Module, input_shape: tuple[int, ...], images: int, precision: Precision
) -> int:
    """Trace what a network takes that is only run forward: its weights, and its largest layer."""
    mode = FakeTensorMode()
    fake = in_eval_mode(_without_data(mode, model))
    with mode:
        largest = 0

        def look(_: nn.Module, *given: Any) -> None:  # inputs, those by keyword, and the output
            nonlocal largest
            tensors = [t for t in tree_flatten(given)[0] if isinstance(t, Tensor)]
            largest = max(largest, sum(t.numel() * t.element_size() for t in tensors))

        for module in fake.modules():
            if not list(module.children()):
                module.register_forward_hook(look, with_kwargs=True)
        with torch.no_grad(), _autocast(precision):
            fake(torch.empty(_TRACED_IMAGES[0], *input_shape))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights + round(largest / _TRACED_IMAGES[0] * images)


def _kept_bytes(
    model: nn.Module, input_shape: tuple[int, ...], images: int, precision: Precision
) -> int:
    mode = FakeTensorMode()
    fake = _without_data(mode, model)
    fake.train()
    with mode:
        own = {parameter.untyped_storage()._cdata for parameter in fake.parameters()}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = tensor  # alive, so that no other gets its number
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), _autocast(precision):
            fake(torch.empty(images, *input_shape))
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _without_data(mode: FakeTensorMode, model: nn.Module) -> nn.Module:
    """Return a copy of a network whose tensors have no data."""
    fake = deep_copy(model)
    for module in fake.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(
                    mode.from_tensor(parameter.detach()), parameter.requires_grad
                )
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
    return fake


def _autocast(precision: Precision) -> torch.autocast:
    dtype = _TYPES.get(precision)
    return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)
