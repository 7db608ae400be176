"""Holding calibration images out: what is fitted is judged on images of other sources."""

from collections.abc import Hashable, Iterator, Sequence

from torch import Tensor

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.plan import NOT_JUDGED

SHARE = 0.25  # of the images that are held out
LARGEST = 128  # images that are held out: each step of fitting is judged on all of them
BLOCKS = 4  # runs of images that are held out, where no sources are named
LEAST = 8  # images, of which some can be held out


def split(images: Calibration, share: float = SHARE) -> tuple[Calibration, Calibration | None]:
    """Split images into those to fit to and those held out, of other sources.

    Where the sources are not known, neighbours are taken to be of one: a few whole runs of images
    are held out. None are if there are fewer than LEAST images, or all are of one source.
    """
    wanted = min(LARGEST, round(share * images.count))
    if images.count < LEAST or wanted < 2:
        return images, None
    held = _spread(groups_of(images, share), wanted)
    if not held or len(held) > images.count - 2:
        return images, None
    chosen = [index in held for index in range(images.count)]
    return _part(images, [not one for one in chosen]), _part(images, chosen)


def not_judged(images: Calibration) -> str:
    """Say, for a plan's explanation, why nothing was judged where none of `images` is held out."""
    return (
        f"{NOT_JUDGED}none of {images.count} calibration images could be held out; give {LEAST} or "
        "more, of two sources or more."
    )


def groups_of(images: Calibration, share: float = SHARE) -> Sequence[Hashable]:
    """Return what each image is in one group by: its source, else the run of neighbours."""
    if images.sources is not None:
        return images.sources
    run = max(1, -(-min(LARGEST, round(share * images.count)) // BLOCKS))
    return [index // run for index in range(images.count)]


def _spread(groups: Sequence[Hashable], wanted: int) -> set[int]:
    """Return the images of whole groups, taken evenly from all, that are `wanted` or more."""
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    order = list(members)
    if len(order) < 2:
        return set()
    held: set[int] = set()
    # Every k-th group first, then those between, until there are enough; one at least is left.
    step = max(2, round(len(groups) / wanted))
    turns = [group for first in range(step - 1, -1, -1) for group in order[first::step]]
    for group in turns[:-1]:
        if len(held) >= wanted:
            break
        held.update(members[group])
    return held


class _Chosen:
    """The images of a calibration that are chosen, in their order."""

    def __init__(self, images: Calibration, chosen: list[bool]) -> None:
        self.images = images
        self.chosen = chosen

    def __iter__(self) -> Iterator[Tensor]:
        start = 0
        for batch in self.images:
            rows = [i for i in range(len(batch)) if self.chosen[start + i]]
            start += len(batch)
            if rows:
                yield batch[rows]


def _part(images: Calibration, chosen: list[bool]) -> Calibration:
    sources = images.sources
    if sources is not None:
        sources = [source for source, take in zip(sources, chosen, strict=True) if take]
    # They come on the device and in the type of `images`.
    part = Calibration(
        _Chosen(images, chosen), device=images.device, sources=sources, packing=images.packing
    )
    part.is_spread = images.is_spread
    return part.laid_out_as(images)
