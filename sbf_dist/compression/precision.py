"""The floating-point types in which networks are compressed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sbf_dist.budget import Budget
from sbf_dist.compression.calibration import dtype_of
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.errors import UserError
from sbf_dist.surgery import deep_copy, in_eval_mode

HALF_PRECISION = (torch.float16, torch.bfloat16)


def working_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in eval mode, in float32 if it is in half precision.

    Layers are fitted to features, of which half precision would leave three digits. Networks in
    float32 and float64 stay as they are.
    """
    copied = in_eval_mode(deep_copy(model))
    return copied.float() if dtype_of(model) in HALF_PRECISION else copied


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
    if dtype_of(reference.module) not in HALF_PRECISION:
        return reference
    return Reference(working_copy(reference.module), reference.channels)


def check_timed(model: nn.Module, budget: Budget) -> None:
    """Raise UserError for a budget of time where layers would be timed in another type."""
    dtype = dtype_of(model)
    if budget.unit == "ms" and dtype in HALF_PRECISION:
        raise UserError(
            f"budget {budget.kind} = {budget.value:g}: the network is in {dtype}, its layers are "
            "fitted and timed in float32; give model.float(), or a budget of macs or params"
        )
