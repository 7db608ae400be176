"""Refuses a network whose weights are not numbers, nor what it gives for calibration images."""

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sbf_dist.errors import UserError
from sbf_dist.hooks import registered


def check_weights(model: nn.Module, name: str) -> None:
    """UserError that names a weight, or a batch norm's statistic, that is not finite, if any is."""
    # Other buffers may have infinities, as masks of attention do; outputs tell if they do harm.
    statistics = ((key, value) for key, value in model.named_buffers() if _is_statistic(key))
    for key, tensor in chain(model.named_parameters(), statistics):
        if not tensor.isfinite().all():
            layer, _, kind = key.rpartition(".")
            where = f"layer {layer} ({kind})" if layer else kind
            raise UserError(
                f"model {name!r} has {_named(tensor)} in {where}: its weights must be finite"
            )


def _is_statistic(key: str) -> bool:
    return key.rpartition(".")[2] in ("running_mean", "running_var")


def check_outputs(model: nn.Module, images: Tensor, outputs: Iterable[Tensor]) -> None:
    """Raise UserError if `outputs`, of `model` for `images`, have NaN or infinity.

    It names the first layer that gives them.
    """
    bad = next((tensor for tensor in outputs if not tensor.isfinite().all()), None)
    if bad is None:
        return
    where = _first_layer(model, images)
    if not images.isfinite().all():
        cause = "the images have them already: give numbers"
    elif where:
        cause = f"first in layer {where}: look at its weights and statistics"
    else:
        cause = "no single layer gives them"
    raise UserError(
        f"model {type(model).__name__} gives {_named(bad)} for the calibration images; {cause}"
    )


def check_features(layer: str | None, *moments: Tensor) -> None:
    """Raise UserError if the first and second moments of a layer's features are not finite."""
    bad = next((tensor for tensor in moments if not tensor.isfinite().all()), None)
    if bad is not None:
        raise UserError(
            f"layer {layer}: its features for the calibration images, or their squares, are "
            f"{_named(bad)}: give the images in the scale that the network knows"
        )


def check_gradients(measured: Mapping[str, Tensor]) -> None:
    """Raise UserError if what gradients say of layers, by their names, is not finite."""
    for layer, values in measured.items():
        if not values.isfinite().all():
            raise UserError(
                f"layer {layer}: the gradients of the network's outputs are {_named(values)} for "
                "the calibration images, so that no importance follows; an operation behind it "
                "has no derivative there, as a root of 0"
            )


@torch.enable_grad()  # hooks of the caller may ask for gradients
def _first_layer(model: nn.Module, images: Tensor) -> str | None:
    """Run `images` again; return the name of the first module without parts that gives them."""
    found: list[str] = []

    def look(name: str, _: nn.Module, __: Any, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    parts = [(name, part) for name, part in model.named_modules() if not any(part.children())]
    with registered(part.register_forward_hook(partial(look, name)) for name, part in parts):
        model(images)
    return f"{found[0]} ({type(model.get_submodule(found[0])).__name__})" if found else None


def _named(tensor: Tensor) -> str:
    return "NaN" if tensor.isnan().any() else "infinity"
