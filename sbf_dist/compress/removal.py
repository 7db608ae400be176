"""Removing channels altogether, with what depends on them, to reach a cost.

What is removed is judged by what its absence does to the network's own predictions, so no labels
are needed. Pruning is this alone; `compress.joint` shares a budget out between it and rebuilding.
"""

import copy
import fnmatch
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sbf_dist.compress.calibration import BATCH, Calibration, device_of
from sbf_dist.compress.cost import Cost, count
from sbf_dist.compress.coupled import Coupled, find_coupled, removed_channels
from sbf_dist.compress.importance import Criterion, has_scales, measure_importance
from sbf_dist.compress.narrow import is_depthwise, narrow
from sbf_dist.compress.plan import Removed
from sbf_dist.compress.statistics import measure_batch_norm
from sbf_dist.errors import UserError


@dataclass(frozen=True)
class Removal:
    """A narrowed network, in eval mode, and how it was made.

    removed: by module name, what was cut off; left: layers none of whose channels could be
    removed, and why ('' is the network as a whole); cost: of the narrowed network.
    """

    network: nn.Module
    removed: dict[str, Removed]
    left: dict[str, str]
    cost: Cost

    def remaining(self, dense: nn.Module) -> dict[str, list[int]]:
        """Numbers in `dense` of the output channels that its narrowed convolutions still have."""
        channels: dict[str, list[int]] = {}
        for name, module in dense.named_modules():
            if isinstance(module, nn.Conv2d) and name in self.removed:
                gone = set(self.removed[name].out)
                channels[name] = [c for c in range(module.out_channels) if c not in gone]
        return channels


@torch.no_grad()
def remove_channels(
    model: nn.Module,
    images: Tensor | Calibration,
    *,
    share: float,
    of: Literal["macs", "params"] = "macs",
    criterion: Criterion = "fisher",
    floor: float = 0.125,
    keep: tuple[str, ...] = (),
    round_to: int = 1,
    seed: int = 0,
) -> Removal:
    """Remove coupled channels from a copy of `model` until it costs `share` of what it did.

    `images` (N, C, H, W) are normalised calibration images. Those channels go whose importance by
    `criterion` is least for what they cost, which is counted anew after each. Every group of
    coupled channels keeps at least `floor` of its channels; groups with a layer whose name matches
    a pattern of `keep` (as in a shell: 'stages.0.*') are left whole, and so is the network's
    output. What is left of a group is a multiple of `round_to` channels. Batch norm is measured
    again. Raises UserError if floors and exceptions leave more than was asked for.
    """
    if not 0 < share <= 1:
        raise UserError(f"removal: share = {share:g} of {of} must lie in (0, 1]")
    dense = copy.deepcopy(model).eval()
    calibration = Calibration.of(images, device=device_of(model))
    before = count(dense, calibration.shape)
    limit = share * (before.macs if of == "macs" else before.params)
    groups, left = find_coupled(dense, calibration.first(2))
    groups, kept = _without(groups, keep)
    left |= kept
    if criterion == "bn_scale":
        without = [group for group in groups if not has_scales(dense, group)]
        left |= {group.name: "no batch norm scales its channels" for group in without}
        groups = [group for group in groups if has_scales(dense, group)]
    importance = measure_importance(dense, groups, calibration, criterion, seed)
    # What no layer's widths say, such as products of features in attention, is counted at the end.
    excess = 0.0
    while True:
        chosen = _choose(dense, groups, importance, before, of, limit - excess, floor, round_to)
        removed = removed_channels(list(zip(groups, chosen, strict=True)))
        network = copy.deepcopy(dense)
        narrow(network, removed)
        after = count(network, calibration.shape)
        over = (after.macs if of == "macs" else after.params) - limit
        if over <= 1e-9 * limit:
            break
        excess += over
    measure_batch_norm(network, calibration, BATCH)
    return Removal(network, removed, left, after)


def _without(groups: list[Coupled], keep: tuple[str, ...]) -> tuple[list[Coupled], dict[str, str]]:
    """Take the groups that make channels of a layer matching `keep` out, with the reason."""
    rest, reasons = [], {}
    for group in groups:
        made = [part.name for part in group.parts if part.side == "out"]
        matches = [p for p in keep if any(fnmatch.fnmatchcase(name, p) for name in made)]
        if matches:
            reasons[group.name] = f"kept whole, as {matches[0]!r} asks"
        else:
            rest.append(group)
    return rest, reasons


class _Widths:
    """The widths of all layers while channels go, and what the network costs with them."""

    def __init__(
        self, dense: nn.Module, groups: list[Coupled], cost: Cost, of: Literal["macs", "params"]
    ) -> None:
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
        self.total = float(cost.macs if of == "macs" else cost.params)

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
            made, read = self.width[name]
            lost = made * read - (made - channels * out) * (read - channels * inp)
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


def _choose(
    dense: nn.Module,
    groups: list[Coupled],
    importance: list[Tensor],
    cost: Cost,
    of: Literal["macs", "params"],
    limit: float,
    floor: float,
    round_to: int,
) -> list[list[int]]:
    """Return which channels of each group go, so that what is left costs at most `limit`.

    Greedy: again and again those go that matter least for what they save now.
    """
    widths = _Widths(dense, groups, cost, of)
    neighbours = widths.neighbours()
    orders = [scores.argsort(stable=True).tolist() for scores in importance]
    sums = [scores[order].cumsum(0) for scores, order in zip(importance, orders, strict=True)]
    gone = [0] * len(groups)

    def step(index: int) -> int:
        """How many channels of a group go next; none where that would leave too few."""
        size = groups[index].size
        count = (size - gone[index]) % round_to or round_to
        least = max(1, math.ceil(floor * size - 1e-9))
        return count if size - gone[index] - count >= least else 0

    def rate(index: int) -> float:
        channels = step(index)
        saved = widths.saving(index, channels) if channels else 0.0
        if saved <= 0:
            return math.inf
        start = float(sums[index][gone[index] - 1]) if gone[index] else 0.0
        return (float(sums[index][gone[index] + channels - 1]) - start) / saved

    rates = [rate(index) for index in range(len(groups))]
    while widths.total > limit * (1 + 1e-9):
        best = min(range(len(groups)), key=rates.__getitem__, default=None)
        if best is None or rates[best] == math.inf:
            whole = cost.macs if of == "macs" else cost.params
            raise UserError(
                f"removal: {limit / whole:.4g} of the {of} cannot be reached; removing all that "
                f"floors and exceptions allow leaves {math.ceil(1e4 * widths.total / whole) / 1e4}"
            )
        channels = step(best)
        widths.remove(best, channels)
        gone[best] += channels
        for index in neighbours[best]:
            rates[index] = rate(index)
    return [sorted(order[:n]) for order, n in zip(orders, gone, strict=True)]
