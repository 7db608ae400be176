"""Networks of several inputs, whose batches travel as one tensor.

Inputs (N, …) are packed into one tensor (N, L), all values of an image in one row, which is cut,
joined and differentiated as any batch of images is. A hook on the network takes it apart again, so
that whoever calls the network with a batch need not know.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sbf_dist.compression.plan import OtherInput
from sbf_dist.errors import UserError


class Described(Protocol):
    """What says which inputs a network takes: a plan, or a student's card."""

    @property
    def input_shape(self) -> tuple[int, int, int]: ...
    @property
    def other_inputs(self) -> list[OtherInput]: ...


@dataclass(frozen=True)
class Packing:
    """How the inputs of a network lie in one tensor: of each its shape without N, and its type.

    Inputs of floating type come in the type of the packed tensor, whatever it is then.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, inputs: Sequence[Tensor]) -> "Packing":
        """Describe how `inputs` are packed."""
        shapes = tuple(tuple(tensor.shape[1:]) for tensor in inputs)
        return cls(shapes, tuple(tensor.dtype for tensor in inputs))

    @classmethod
    def planned(cls, plan: "Described") -> "Packing | None":
        """Describe how the inputs that a plan or a card tells of are packed; None if it is one."""
        if not plan.other_inputs:
            return None
        others = [one.dtype for one in plan.other_inputs]
        found = [torch.float32 if one == "float" else getattr(torch, one, None) for one in others]
        dtypes = [dtype for dtype in found if isinstance(dtype, torch.dtype)]
        if len(dtypes) < len(others):
            raise UserError(f"plan: other_inputs have the types {', '.join(others)}: unknown")
        shapes = (plan.input_shape, *(one.shape for one in plan.other_inputs))
        return cls(shapes, (torch.float32, *dtypes))

    @property
    def sizes(self) -> list[int]:
        """Values of each input in a row."""
        return [math.prod(shape) for shape in self.shapes]

    def pack(self, inputs: Any, dtype: torch.dtype | None = None) -> Tensor:
        """Return (N, L) of the first tensors of a batch, in `dtype`, or else the first one's type.

        It is float32 at least. Raises UserError if they are not as many tensors of equal length, of
        other shapes, or if they have integers that it cannot hold.
        """
        wanted = len(self.shapes)
        tensors = list(inputs[:wanted]) if isinstance(inputs, list | tuple) else []
        if len(tensors) < wanted or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise UserError(
                f"calibration images: a batch is a {type(inputs).__name__}, it must be a tuple of "
                f"{wanted} tensors: the network takes so many"
            )
        if [tuple(tensor.shape[1:]) for tensor in tensors] != list(self.shapes):
            found = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise UserError(
                f"calibration images: a batch of {found} came where the first inputs are "
                f"{', '.join(map(str, self.shapes))}"
            )
        if len({len(tensor) for tensor in tensors}) > 1:
            raise UserError("calibration images: the inputs of a batch are not equally many")
        # Half precision holds integers to 2048 or 256 only.
        wide = torch.promote_types(dtype or tensors[0].dtype, torch.float32)
        device = tensors[0].device
        packed = [tensor.reshape(len(tensor), -1).to(device, wide) for tensor in tensors]
        for number, (tensor, one) in enumerate(zip(tensors, packed, strict=True), 1):
            if not tensor.is_floating_point() and not _holds(one, tensor):
                raise UserError(
                    f"calibration images: input {number} has integers of up to "
                    f"{int(tensor.abs().max())} in size, which {wide} cannot hold: inputs travel "
                    "together, as floats"
                )
        return torch.cat(packed, 1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs, as they were.

        Where blanks of NaN stand for them (`cuts`), integers are 0: they may be indices.
        """
        parts = packed.split(self.sizes, 1)
        return tuple(
            (part if dtype.is_floating_point else part.nan_to_num(0).to(dtype))
            .reshape(-1, *shape)
            .contiguous()
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        )

    def install(self, model: nn.Module) -> nn.Module:
        """Let `model` take packed inputs, in place; return it. Copies of it do so as well."""
        if packing_of(model) is None:
            model.register_forward_pre_hook(_Unpack(self))
        return model


def _holds(packed: Tensor, integers: Tensor) -> bool:
    """Whether the integers can be had back."""
    return torch.equal(packed.to(integers.dtype), integers.reshape(packed.shape).to(packed.device))


@dataclass(frozen=True)
class _Unpack:
    packing: Packing

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.packing.unpack(args[0]) if len(args) == 1 else args


def packing_of(model: nn.Module) -> Packing | None:
    """Return how the inputs that `model` takes are packed; None if they are not."""
    hooks = model._forward_pre_hooks.values()
    return next((hook.packing for hook in hooks if isinstance(hook, _Unpack)), None)


def without_packing(model: nn.Module) -> nn.Module:
    """Let `model` take its inputs one by one again, in place; return it."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _Unpack):
            del model._forward_pre_hooks[key]
    return model


def input_shapes(model: nn.Module, images: Tensor) -> tuple[tuple[int, ...], ...]:
    """Return the shape, without N, of each input that `model` makes of `images`."""
    packing = packing_of(model)
    return (tuple(images.shape[1:]),) if packing is None else packing.shapes


def number_of_inputs(model: nn.Module) -> int:
    """Return how many arguments the forward pass of `model` cannot do without, at least one."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except ValueError:  # of a scripted module
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return max(1, len(needed))


def check_takes_images_alone(model: nn.Module, named: str) -> None:
    """Raise UserError if `model`, called `named` in it, needs other inputs beside the images."""
    wanted = number_of_inputs(model)
    if wanted > 1:
        raise UserError(
            f"{named} takes {wanted} inputs, and it is given images alone here: compress it in "
            "Python, by sbf_dist.compress with batches that are tuples of so many tensors"
        )
