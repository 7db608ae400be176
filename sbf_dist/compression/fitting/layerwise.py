"""Moments of many layers from a small number of forward passes.

A pass costs as much as the network, a layer's Gram matrix as much memory as its width squared. So
the layers of a network are taken in groups whose matrices fit a budget, and of each layer no more
positions are looked at than its fit needs.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.resuming import Passes
from sbf_dist.compression.fitting.shelf import Shelf
from sbf_dist.compression.fitting.statistics import Moments, MomentSums, neighbourhoods
from sbf_dist.hooks import on_output, registered
from sbf_dist.layers import SBFConv2d

SUMS = 768 * 2**20  # bytes of Gram matrices that are gathered in one pass
TARGETS = 640 * 2**20  # bytes of a reference's outputs that are held at a time
# Neighbours in a large feature map add little for the work that they cost. But an image less
# is a forward pass less, and those are dear where maps are large: there, IMAGES will do.
PER_IMAGE, PER_MAP = 128, 1 / 6  # positions of an image, and their share, that are worth taking
IMAGES = 128
LEAST, MOST = 2**14, 2**15  # positions in all; in between, the fewer the wider the layer is
WIDE = 1024  # candidates, shifts included, or weights of a filter, at which LEAST suffices


@dataclass(frozen=True)
class Draw:
    """Which positions of a layer's outputs are looked at: `per_image` of each of `images`.

    The same for any network in which the layer has the same name, so that what two networks give
    can be compared without holding more.
    """

    name: str
    images: int
    per_image: int

    @classmethod
    def of(cls, name: str, width: int, positions: int, images: int) -> "Draw":
        """Choose for a layer of `width` unknowns to solve for at once, that has `positions`."""
        wanted = min(MOST, max(LEAST, LEAST * WIDE // width))
        of_large_maps = min(round(PER_MAP * positions), -(-wanted // IMAGES))
        per_image = min(positions, max(PER_IMAGE, of_large_maps, -(-wanted // images)))
        return cls(name, min(images, -(-wanted // per_image)), per_image)

    def rows(self, features: Tensor, size: int, start: int) -> Tensor:
        """Lay out the drawn neighbourhoods of (N, C, H, W) as `neighbourhoods` does.

        `start` is the number of the first image. Images beyond those of the draw are left out.
        """
        features = features[: max(0, self.images - start)]
        of = features.shape[2] * features.shape[3]
        return neighbourhoods(features, size, self.positions(start, len(features), of))

    def positions(self, start: int, images: int, of: int) -> Tensor | None:
        """Draw positions (images, k) of `of`; None if that is all. `start` is as in `rows`."""
        if self.per_image >= of:
            return None
        seed = zlib.crc32(f"{self.name} {start}".encode())
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(images, of, generator=generator).topk(self.per_image).indices


def visit(
    model: nn.Module, images: Tensor, layers: dict[str, Callable[[Tensor, Tensor], None]]
) -> None:
    """Run `model` until all `layers` have been reached, telling each its input and output."""
    missing = set(layers)

    class Reached(Exception):  # noqa: N818  (it is control flow, not an error)
        pass

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: Tensor, output: Tensor) -> None:
            layers[name](given, output)
            missing.discard(name)
            if not missing:
                raise Reached

        return hook

    hooks = (on_output(model.get_submodule(n), hook_of(n)) for n in layers)
    with registered(hooks), suppress(Reached):
        model(images)
    assert not missing, f"{sorted(missing)} are not reached by a forward pass"


def draws(model: nn.Module, sizes: dict[str, int], images: Calibration) -> dict[str, Draw]:
    """Choose the positions to look at in each layer, whose transformations have these sizes."""
    chosen: dict[str, Draw] = {}

    def choose(name: str) -> Callable[[Tensor, Tensor], None]:
        def seen(_: Tensor, output: Tensor) -> None:
            positions = output[0, 0].numel()
            candidates = output.shape[1] * sizes[name] ** 2
            layer = layer_of(model, name)
            conv = layer.basis if isinstance(layer, SBFConv2d) else layer
            width = max(candidates, conv.weight[0].numel())  # filters may be solved anew, too
            chosen[name] = Draw.of(name, width, positions, images.count)

        return seen

    visit(model, images.first(1), {name: choose(name) for name in sizes})
    return chosen


def gather_layers(
    model: nn.Module, sizes: dict[str, int], images: Calibration, passes: Passes | None = None
) -> Iterator[tuple[str, Moments]]:
    """Give the moments of each layer's own outputs (without its bias, as candidates), one by one.

    `sizes` are the layers' m, in forward order. Layers are gathered in groups, one of `passes` (by
    default whole ones) for each: take them as they come, and no more than one group's matrices are
    held.
    """
    chosen = draws(model, sizes, images)
    passes = passes or Passes(model, images, {}, Shelf(0))
    groups = _groups(list(sizes), lambda name: _bytes_of_sums(model, name, sizes[name]), SUMS)
    for group, following in zip_longest(groups, groups[1:]):
        sums = {name: MomentSums(sizes[name]) for name in group}

        def add(
            name: str, start: int, _: Tensor, output: Tensor, sums: dict[str, MomentSums] = sums
        ) -> None:
            bias = layer_of(model, name).bias
            plain = output if bias is None else output - bias[:, None, None]
            columns = chosen[name].rows(plain, sizes[name], start)
            sums[name].add(columns, chosen[name].rows(output, 1, start))

        drawn = {name: chosen[name] for name in group}
        _visit_drawn(passes, drawn, add, following[0] if following else None)
        for name in group:
            yield name, sums.pop(name).moments(name)


def _visit_drawn(
    passes: Passes,
    chosen: dict[str, Draw],
    seen: Callable[[str, int, Tensor, Tensor], None],
    then: str | None,
) -> None:
    """Tell `seen` a layer, the first image's number, inputs and outputs while its draw lasts.

    `then` is the layer that will be looked at next.
    """
    first = {name: draw.images for name, draw in chosen.items()}
    passes.visit({name: partial(seen, name) for name in chosen}, first, then)


class Targets:
    """What a reference's layers give at the positions that are drawn, some layers at a time.

    Layers are asked for in the order of `chosen`; the rows of a group of them, TARGETS bytes in
    all, come from one of `passes` over the reference.
    """

    def __init__(self, reference: Reference, chosen: dict[str, Draw], passes: Passes) -> None:
        self._reference = reference
        self._chosen = chosen
        self._passes = passes
        self._left = _groups(list(chosen), self._bytes, TARGETS)
        self._held: dict[str, Tensor] = {}

    def pop(self, name: str) -> Tensor:
        """Return the rows (images · per_image, C) of a layer's draw, and forget them."""
        if name not in self._held:
            index = next(i for i, group in enumerate(self._left) if name in group)
            following = self._left[index + 1 : index + 2]
            self._held = {}
            self._gather(self._left[index], following[0][0] if following else None)
        return self._held.pop(name)

    def _gather(self, group: Sequence[str], then: str | None) -> None:
        def keep(name: str, start: int, _: Tensor, output: Tensor) -> None:
            selected = self._reference.select(name, output)
            draw = self._chosen[name]
            rows = draw.rows(selected, 1, start)
            if name not in self._held:
                # In one piece: between features that come and go, small pieces that stay would
                # leave holes of their size.
                self._held[name] = rows.new_empty(draw.images * draw.per_image, rows.shape[1])
            first = start * draw.per_image
            self._held[name][first : first + len(rows)] = rows

        drawn = {name: self._chosen[name] for name in group}
        _visit_drawn(self._passes, drawn, keep, then)

    def _bytes(self, name: str) -> int:
        draw = self._chosen[name]
        layer = layer_of(self._reference.module, name)
        element = next(layer.parameters()).element_size()
        return draw.images * draw.per_image * layer.out_channels * element


def _bytes_of_sums(model: nn.Module, name: str, size: int) -> int:
    channels = layer_of(model, name).out_channels
    return 8 * channels * size**2 * (channels * size**2 + channels)


def layer_of(model: nn.Module, name: str) -> nn.Conv2d | SBFConv2d:
    """Return a layer of a network, whether it has been converted or not."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Conv2d | SBFConv2d)
    return layer


def _groups(names: list[str], bytes_of: Callable[[str], int], most: int) -> list[list[str]]:
    """Cut a list into runs of at most `most` bytes, or of one that is larger."""
    groups: list[list[str]] = []
    held = 0
    for name in names:
        held += bytes_of(name)
        if not groups or held > most:
            groups.append([])
            held = bytes_of(name)
        groups[-1].append(name)
    return groups
