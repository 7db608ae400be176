"""How many channels of each group go, by what they cost and what they save."""

import math
from collections.abc import Sequence
from typing import Literal

from torch import nn

from sbf_dist.compression.cost import Cost
from sbf_dist.compression.narrow import is_depthwise
from sbf_dist.compression.removal.coupled import Coupled
from sbf_dist.compression.removal.removal_order import Order
from sbf_dist.errors import UserError
from sbf_dist.settings import Compression

Measure = Literal["macs", "params"]


def cost_of(cost: Cost, what: Measure) -> int:
    """Return the multiply-adds or the parameters."""
    return cost.macs if what == "macs" else cost.params


class Widths:
    """The widths of all layers while channels go, and what the network costs with them."""

    def __init__(self, dense: nn.Module, groups: list[Coupled], cost: Cost, of: Measure) -> None:
        self.of = of
        self.width: dict[str, list[int]] = {}  # output and input channels
        self.price: dict[str, tuple[float, float]] = {}  # of a pair of them, of an output alone
        self.removed: list[dict[str, tuple[int, int]]] = []  # by one channel of each group
        for group in groups:
            losses: dict[str, tuple[int, int]] = {}
            for part in group.parts:
                if part.name not in self.width:
                    self._add(dense, part.name, cost)
                out, inp = losses.get(part.name, (0, 0))
                several = len(part.channels[0])
                out, inp = (out + several, inp) if part.side == "out" else (out, inp + several)
                losses[part.name] = (out, inp)
            self.removed.append(losses)
        self.total = float(cost_of(cost, of))

    def _add(self, dense: nn.Module, name: str, cost: Cost) -> None:
        module = dense.get_submodule(name)
        paired, alone = 0.0, 0.0
        if isinstance(module, nn.Conv2d | nn.Linear):
            out, inp = module.weight.shape[0], module.weight.shape[1]
            if is_depthwise(module):
                inp = 1
            paired = module.weight.numel() / (out * inp)
            if self.of == "macs":
                paired = cost.layers.get(name, 0) / (out * inp)
            elif module.bias is not None:
                alone = 1.0
        else:
            out = max([len(p) for p in module.parameters(recurse=False)], default=0)
            inp = 1
            if self.of == "params":
                alone = float(len(list(module.parameters(recurse=False))))
        self.width[name] = [out, inp]
        self.price[name] = (paired, alone)

    def saving(self, group: int, channels: int) -> float:
        """What the network costs less without so many more channels of a group."""
        saved = 0.0
        for name, (out, inp) in self.removed[group].items():
            paired, alone = self.price[name]
            out_width, in_width = self.width[name]
            left = (out_width - channels * out) * (in_width - channels * inp)
            lost = out_width * in_width - left
            saved += paired * lost + alone * channels * out
        return saved

    def remove(self, group: int, channels: int) -> None:
        self.total -= self.saving(group, channels)
        for name, (out, inp) in self.removed[group].items():
            self.width[name][0] -= channels * out
            self.width[name][1] -= channels * inp

    def neighbours(self) -> list[list[int]]:
        """For each group, those whose savings change when it is narrowed (itself among them)."""
        users: dict[str, list[int]] = {}
        for index, losses in enumerate(self.removed):
            for name in losses:
                users.setdefault(name, []).append(index)
        return [
            sorted({user for name in losses for user in users[name]}) for losses in self.removed
        ]


def choose_channels(
    widths: Widths, orders: Sequence[Order], settings: Compression, limit: float
) -> list[list[int]]:
    """Return which channels of each group go, so that what is left costs at most `limit`.

    Greedy: again and again those go that matter least for what they save now. `widths` are those of
    all layers as they are, and are used up. Raises UserError if `limit` cannot be reached.
    """
    neighbours = widths.neighbours()
    gone = [0] * len(orders)
    whole = widths.total
    floor, round_to = settings.floor, settings.round_to

    def step(index: int) -> int:
        """How many channels of a group go next; 0 where that would leave less than the floor."""
        size = len(orders[index].channels)
        count = (size - gone[index]) % round_to or round_to
        least = max(1, math.ceil(floor * size - 1e-9))
        return count if size - gone[index] - count >= least else 0

    def rate(index: int) -> float:
        channels = step(index)
        saved = widths.saving(index, channels) if channels else 0.0
        if saved <= 0:
            return math.inf
        order = orders[index]
        return (order.loss(gone[index] + channels) - order.loss(gone[index])) / saved

    rates = [rate(index) for index in range(len(orders))]
    while widths.total > limit * (1 + 1e-9):
        best = min(range(len(orders)), key=rates.__getitem__, default=None)
        if best is None or rates[best] == math.inf:
            least = math.ceil(1e4 * widths.total / whole) / 1e4
            raise UserError(
                f"removal: {limit / whole:.4g} of the {widths.of} cannot be reached; removing all "
                f"that floors and exceptions allow leaves {least}"
            )
        channels = step(best)
        widths.remove(best, channels)
        gone[best] += channels
        for index in neighbours[best]:
            rates[index] = rate(index)
    return [sorted(order.channels[:n]) for order, n in zip(orders, gone, strict=True)]
