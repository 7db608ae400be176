"""Points of a forward pass from which a network can go on: what is kept there, what is left out.

The pass goes on from such a point: the modules whose outputs are its state give what they gave,
the others before it blanks, and the network's own code runs as always. Blanks are full of NaN:
what is read by mistake cannot go unseen. finding_cuts.py finds the points.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

State = dict[str, Tensor]  # what modules have given, by their names


@dataclass(frozen=True)
class Blank:
    """What stands for a tensor that is not read: its shape for one image, None for no images."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    batched: bool

    def of(self, images: int, *, solid: bool) -> Tensor:
        """Return a tensor of one number: NaN, where the type has it.

        It takes no memory, and cannot be written to, unless it is to be `solid`.
        """
        value = math.nan if self.dtype.is_floating_point or self.dtype.is_complex else 0
        shape = (images, *self.shape) if self.batched else self.shape
        blank = torch.full((), value, dtype=self.dtype, device=self.device).expand(shape)
        return blank.contiguous() if solid else blank


@dataclass(frozen=True)
class Cut:
    """A point of a forward pass: where the module `last` finishes.

    position: later points have larger ones; kept: modules whose outputs are the state there;
    blanks: what the other modules that have finished give from then on; images: what the network is
    given then; solid: whether the network's own code needs blanks that it can write to.
    """

    position: int
    last: str
    kept: tuple[str, ...]
    blanks: Mapping[str, Any]
    images: Blank
    solid: bool = False


class Resuming:
    """Lets `model` go on from `cut`, while it lasts: modules before it give state and blanks.

    The pass may write to the tensors of `state`.
    """

    def __init__(self, model: nn.Module, cut: Cut, state: State, images: int) -> None:
        self._cut = cut
        self._images = images
        self._given: dict[nn.Module, Callable[[], object]] = {
            model.get_submodule(name): partial(tree_map, self._blank, outputs)
            for name, outputs in cut.blanks.items()
        }
        for name, output in state.items():
            self._given[model.get_submodule(name)] = partial(_as_it_is, output)
        self._own: dict[nn.Module, object] = {}  # forwards that someone else has put there

    def __enter__(self) -> Tensor:
        for module, give in self._given.items():
            if "forward" in module.__dict__:
                self._own[module] = module.__dict__["forward"]
            module.__dict__["forward"] = lambda *_, give=give, **__: give()
        return self._cut.images.of(self._images, solid=self._cut.solid)

    def __exit__(self, *_: object) -> None:
        for module in self._given:
            del module.__dict__["forward"]
            if module in self._own:
                module.__dict__["forward"] = self._own[module]

    def _blank(self, leaf: object) -> object:
        if not isinstance(leaf, Blank):
            return leaf
        return leaf.of(self._images, solid=self._cut.solid)


def _as_it_is(output: Tensor) -> Tensor:
    return output


class Keeping:
    """Hooks that copy the state at `cut` when a pass comes there."""

    def __init__(self, model: nn.Module, cut: Cut) -> None:
        self._model = model
        self.cut = cut
        self._given: State = {}
        self.state: State | None = None

    def hooks(self, then: Callable[[], None] = lambda: None) -> Iterator[Any]:
        """Register the hooks; `then` is called when the state has been copied."""
        for name in self.cut.kept:
            yield self._model.get_submodule(name).register_forward_hook(self._keep(name))
        yield self._model.get_submodule(self.cut.last).register_forward_hook(self._copy(then))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            self._given[name] = output

        return hook

    def _copy(self, then: Callable[[], None]) -> Callable[..., None]:
        def hook(*_: object) -> None:
            # As it is now: what follows may overwrite it in place.
            self.state = {name: output.clone() for name, output in self._given.items()}
            self._given = {}
            then()

        return hook
