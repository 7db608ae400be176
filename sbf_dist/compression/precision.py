"""The floating-point types in which networks are compressed."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from sbf_dist.budget import Budget
from sbf_dist.compression.calibration import dtype_of
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.errors import UserError
from sbf_dist.surgery import deep_copy, in_eval_mode

HALF_PRECISION = (torch.float16, torch.bfloat16)


def working_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in eval mode, in float32 if it, or a part, is in half precision.

    Layers are fitted to features, of which half precision would leave three digits. Networks in
    float32 and float64 stay as they are.
    """
    copied = in_eval_mode(deep_copy(model))
    return copied if _half_type(model) is None else copied.float()


def with_types_of(model: nn.Module, student: nn.Module) -> nn.Module:
    """Give the tensors of `student`, in place, the types of those of their names in `model`.

    New ones have the type of the first tensor of the layer that they are in. Returns `student`.
    """
    types: dict[str, torch.dtype] = {"": dtype_of(model)}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            types[name] = tensor.dtype
            for layer in _within(name):
                types.setdefault(layer, tensor.dtype)
    for name, tensor in chain(student.named_parameters(), student.named_buffers()):
        if tensor.is_floating_point():
            known = next(filter(types.__contains__, (name, *_within(name))))
            tensor.data = tensor.data.to(types[known])
    return student


def _within(name: str) -> list[str]:
    """Return the names of what `name` is in, inside out; '' is the network."""
    places = name.split(".")[:-1]
    return [".".join(places[:end]) for end in range(len(places), -1, -1)]


def _half_type(model: nn.Module) -> torch.dtype | None:
    """Return the type of the first parameter in half precision; None if there is none."""
    return next((p.dtype for p in model.parameters() if p.dtype in HALF_PRECISION), None)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn the caller's autocast off in a `with` block, or in a function that this decorates.

    That of a network's own forward stays, but keeps no casts of weights: they are changed in place.
    """
    with (
        torch.autocast("cpu", enabled=False, cache_enabled=False),
        torch.autocast("cuda", enabled=False, cache_enabled=False),
    ):
        yield


def widened(features: Tensor) -> Tensor:
    """Return features in float32 if they are in half precision, as autocast gives them."""
    return features.float() if features.dtype in HALF_PRECISION else features


def working_reference(reference: Reference) -> Reference:
    """Return `reference` in the type that `working_copy` gives a network."""
    if _half_type(reference.module) is None:
        return reference
    return Reference(working_copy(reference.module), reference.channels)


def check_timed(model: nn.Module, budget: Budget) -> None:
    """Raise UserError for a budget of time where layers would be timed in another type."""
    dtype = _half_type(model)
    if budget.unit == "ms" and dtype is not None:
        raise UserError(
            f"budget {budget.kind} = {budget.value:g}: the network is in {dtype}, its layers are "
            "fitted and timed in float32; give model.float(), or a budget of macs or params"
        )
