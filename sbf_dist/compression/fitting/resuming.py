"""Passes over images that go on from where the last one left them.

Layers are fitted one after the other, each on what the layers before it give. From the network's
first layer each time, that would take time that grows with the square of the depth. So what the
network gives up to a point is kept, and the next pass goes on from there (`cuts`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.cuts import Cut, Keeping, Resuming
from sbf_dist.compression.fitting.finding_cuts import find_cuts
from sbf_dist.compression.fitting.shelf import Kept, Shelf
from sbf_dist.hooks import on_input, on_output, registered

Seen = Callable[[int, Tensor, Tensor], None]  # of the first image's number, inputs and outputs


class _Reached(Exception):  # noqa: N818  (it is control flow, not an error)
    """Raised by a hook to leave a pass where nothing more is wanted."""


@dataclass
class _Part:
    """Images that go together: the first one's number, how many, and how far they have come."""

    start: int
    count: int
    cut: Cut | None = None
    state: Kept | None = None


@dataclass(frozen=True)
class Route:
    """Where passes over a student and its reference can go on, and memory for what is kept there.

    student, reference: the points before layers; memory: bytes, beyond which a file is used.
    """

    student: Mapping[str, Cut] = field(default_factory=dict)
    reference: Mapping[str, Cut] = field(default_factory=dict)
    memory: int = 0

    @classmethod
    def of(
        cls,
        student: nn.Module,
        reference: nn.Module,
        images: Tensor,
        layers: Sequence[str],
        memory: int,
    ) -> Self:
        """Find the points before `layers` of two networks in eval mode."""
        cuts = find_cuts(student, images, layers)
        if reference is student:
            return cls(cuts, cuts, memory)
        return cls(cuts, find_cuts(reference, images, layers), memory)


@dataclass(frozen=True)
class Side:
    """Passes of a student and of its reference over the same images."""

    student: "Passes"
    reference: "Passes"

    @classmethod
    def of(
        cls, student: nn.Module, reference: nn.Module, images: Calibration, route: Route
    ) -> Self:
        """Begin passes over `images`."""
        shelf = Shelf(route.memory)
        return cls(
            Passes(student, images, route.student, shelf),
            Passes(reference, images, route.reference, shelf),
        )

    def is_before(self, name: str | None) -> bool:
        """Tell whether layer `name`, if one is named, can still be asked for in both networks."""
        return self.student.are_before(name) and self.reference.are_before(name)


class Passes:
    """Images on their way through `model`, part by part.

    `cuts` has the points before layers (`find_cuts`); without any, each pass is a whole one. Layers
    are asked for in forward order. What is before the layer that was asked for last must not be
    changed any more: a part that has come to a point goes on from there.
    """

    def __init__(
        self, model: nn.Module, images: Calibration, cuts: Mapping[str, Cut], shelf: Shelf
    ) -> None:
        self.model = model
        self.images = images
        self._cuts = cuts
        self._shelf = shelf
        self._parts: list[_Part] = []
        start = 0
        for count in images.part_sizes(images.part):
            self._parts.append(_Part(start, count))
            start += count

    def are_before(self, name: str | None) -> bool:
        """Tell whether layer `name`, if one is named, can still be asked for in all parts."""
        if name is None:
            return True
        cut = self._cuts.get(name)
        reached = -1 if cut is None else cut.position
        return all(part.cut is None or part.cut.position <= reached for part in self._parts)

    def inputs(self, name: str, first: int) -> Iterator[Tensor]:
        """Give the inputs of layer `name` for the `first` images, batch by batch, whole ones."""
        return self._at(name, first, on_input)

    def outputs_of(self, name: str, first: int) -> Iterator[Tensor]:
        """Give the outputs of layer `name` likewise."""
        return self._at(name, first, on_output)

    @torch.no_grad()
    def _at(
        self, name: str, first: int, register: Callable[..., RemovableHandle]
    ) -> Iterator[Tensor]:
        for part, batch in self._batches(first):
            found: list[Tensor] = []

            def look(_: nn.Module, *given: Any, found: list[Tensor] = found) -> None:
                found.append(given[-1])  # the input, or the output behind it
                raise _Reached

            with registered([register(self.model.get_submodule(name), look)]):
                self._run(part, batch, self._keeping(part, self._cuts.get(name)))
            assert found, f"{name} is not reached by a forward pass"
            yield found[0]

    @torch.no_grad()
    def visit(
        self, layers: Mapping[str, Seen], first: Mapping[str, int], then: str | None = None
    ) -> None:
        """Tell each of `layers` what it is given and gives, for as many `first` images.

        Parts may have some more images than that. `then` is the layer that will be asked for next.
        """
        cut = None if then is None else self._cuts.get(then)
        for part, batch in self._batches(max(first.values())):
            missing = {name for name in layers if part.start < first[name]}
            keeping = self._keeping(part, cut)

            def done(missing: set[str] = missing, keeping: Keeping | None = keeping) -> None:
                if not missing and (keeping is None or keeping.state is not None):
                    raise _Reached

            def hook_of(
                name: str, part: _Part, missing: set[str], done: Callable[[], None]
            ) -> Callable[..., None]:
                def hook(_: nn.Module, given: Tensor, output: Tensor) -> None:
                    layers[name](part.start, given, output)
                    missing.discard(name)
                    done()

                return hook

            hooks = (
                on_output(self.model.get_submodule(name), hook_of(name, part, missing, done))
                for name in list(missing)
            )
            with registered(hooks):
                self._run(part, batch, keeping, done)
            assert not missing, f"{sorted(missing)} are not reached by a forward pass"

    @torch.no_grad()
    def outputs(self, then: str | None = None) -> Iterator[Any]:
        """Give what the network gives, part by part, from where they are.

        `then` is the layer that will be asked for next; without it the parts stay where they are.
        """
        cut = None if then is None else self._cuts.get(then)
        for part, batch in self._batches(self.images.count):
            yield self._run(part, batch, self._keeping(part, cut))

    def _keeping(self, part: _Part, cut: Cut | None) -> Keeping | None:
        """Hooks that keep the state at `cut`, if the part has not come there yet."""
        if cut is None or (part.cut is not None and part.cut.position >= cut.position):
            return None
        return Keeping(self.model, cut)

    def _run(
        self,
        part: _Part,
        batch: Tensor | None,
        keeping: Keeping | None,
        then: Callable[[], None] = lambda: None,
    ) -> Any:
        """Run the network on a part, and move it to where its state is kept on the way."""
        output = None
        with ExitStack() as stack:
            if part.cut is not None:
                assert part.state is not None
                state = self._shelf.get(part.state)
                batch = stack.enter_context(Resuming(self.model, part.cut, state, part.count))
                del state
            if keeping is not None:
                stack.enter_context(registered(keeping.hooks(then)))
            with suppress(_Reached):
                output = self.model(batch)
        if keeping is not None and keeping.state is not None:
            if part.state is not None:
                self._shelf.give_back(part.state)
            part.state = self._shelf.keep(keeping.state)
            part.cut = keeping.cut
        return output

    def _batches(self, first: int) -> Iterator[tuple[_Part, Tensor | None]]:
        """Give the parts that the `first` images are in, with the images of those at the start."""
        fresh: Iterator[Tensor] | None = None
        passed = 0
        for index, part in enumerate(self._parts):
            if part.start >= first:
                return
            if part.cut is not None:
                yield part, None
                continue
            if fresh is None:
                fresh = self.images.parts(self.images.part, first)
            while passed < index:
                next(fresh)
                passed += 1
            passed += 1
            yield part, next(fresh)
        if fresh is not None:
            next(fresh, None)  # so that all of them are seen to be as many as before
