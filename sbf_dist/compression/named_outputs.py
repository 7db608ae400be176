"""What a network's outputs are: tensors in any structure, by name, and which of them count.

Outputs are one tensor, or tensors in tuples, lists, dicts and dataclasses, in any depth; each has a
name: 'out', '0', 'features.1'. Those that count are tensors of floating type that have a row for
each image and depend on the network's weights.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sbf_dist.compression.inputs import input_shapes
from sbf_dist.errors import UserError

ALONE = ""  # name of an output that is the only one


def named_tensors(outputs: Any) -> dict[str, Tensor]:
    """Map names to all tensors in a network's outputs, in order; a lone tensor's name is ALONE."""
    return dict(_walk(outputs, ()))


def _walk(value: Any, place: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield ".".join(place), value
    for key, part in _parts(value):
        yield from _walk(part, (*place, str(key)))


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a namedtuple
        return zip(value._fields, value, strict=True)
    if isinstance(value, list | tuple):
        return enumerate(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return ()


def run_on(model: nn.Module, images: Tensor) -> Any:
    """Return what `model` gives for `images`; UserError, in one line, if it cannot take them."""
    try:
        return model(images)
    except Exception as error:  # whatever the network's own code raises on what it cannot take
        shapes = input_shapes(model, images)
        size = " and ".join(" x ".join(map(str, shape)) for shape in shapes)
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model {type(model).__name__} cannot take images of {size}: "
            f"{type(error).__name__}: {reason}"
        ) from error


def counted(
    model: nn.Module, outputs: Any, images: int, names: Sequence[str] | None
) -> dict[str, Tensor]:
    """Return the outputs of `model` for so many images that count: see the top of this file.

    names: those that are to count, each an output or a structure of them; None for all. Raises
    UserError if there is none, and for a name of none.
    """
    kind = type(model).__name__
    everything = named_tensors(outputs)
    rows = {
        name: tensor
        for name, tensor in everything.items()
        if tensor.is_floating_point() and tensor.ndim > 0 and len(tensor) == images
    }
    if not rows:
        found = ", ".join(
            f"{name or 'one tensor'} {tuple(tensor.shape)}" for name, tensor in everything.items()
        )
        raise UserError(
            f"model {kind} must return floats with a row for each image in evaluation mode; for "
            f"{images} images it returns {found or type(outputs).__name__}; of a detector, give "
            "the backbone"
        )
    if names is not None:
        rows = {n: t for name in names for n, t in rows.items() if _is_in(n, name)}
        for name in names:
            if not any(_is_in(one, name) for one in rows):
                known = ", ".join(n or "a single one without a name" for n in everything)
                raise UserError(
                    f"outputs: {name!r} is not an output of {kind} that can be compared; it has "
                    f"{known}"
                )
    # Where no output depends on weights, as under no_grad, the reasons of layers say so.
    learnt = {name: tensor for name, tensor in rows.items() if tensor.requires_grad}
    return learnt or rows


def _is_in(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")
