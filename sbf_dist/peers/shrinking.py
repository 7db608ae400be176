"""Meeting a budget exactly with steps that come in an order of their own."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from sbf_dist.errors import UserError

NUM_TRIED_STEPS = 16  # steps that are tried to fill what is left of a budget

Step = TypeVar("Step")


def longest_within(
    steps: Sequence[Step], cost: Callable[[Sequence[Step]], int], limit: float, what: str
) -> list[Step]:
    """Take the smallest number of `steps`, from the first on, that brings `cost` to `limit`.

    The cost must not grow with more steps. The last step may have gone further than needed: of the
    steps that were taken, from the last on, those are taken back whose return fits the limit, so
    that what `limit` allows is used. Raises UserError, naming `what`, if all steps do not suffice.
    """
    low, high = 0, len(steps)
    if cost(steps) > limit:
        raise UserError(f"{what}: even its smallest network costs more than {limit:.0f} MACs")
    while low < high:
        middle = (low + high) // 2
        if cost(steps[:middle]) <= limit:
            high = middle
        else:
            low = middle + 1
    taken = list(steps[:low])
    for step in reversed(taken[-NUM_TRIED_STEPS:]):
        rest = [other for other in taken if other is not step]
        if cost(rest) <= limit:
            taken = rest
    return taken


def in_proportion(sizes: dict[str, int], least: float) -> list[tuple[str, int]]:
    """Order the removals of single channels so that all layers shrink alike.

    Returns (layer, rank) with rank 0 the first channel of a layer to go, sorted by the share of its
    layer that is gone by then; every layer keeps max(1, least · size) channels.
    """
    steps = [
        ((rank + 0.5) / size, name, rank)
        for name, size in sizes.items()
        for rank in range(size - max(1, round(least * size)))
    ]
    return [(name, rank) for _, name, rank in sorted(steps)]
