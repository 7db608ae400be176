"""Removing channels altogether, with what depends on them, to reach a cost.

What is removed is judged by what its absence does to the network's own predictions, so no labels
are needed. Pruning is this alone; `joint` shares a budget out between it and rebuilding.
"""

import dataclasses
import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sbf_dist.compression.calibration import Calibration, device_of
from sbf_dist.compression.candidates import kept_dense, uses
from sbf_dist.compression.convertible import with_counts
from sbf_dist.compression.cost import Cost, count
from sbf_dist.compression.fitting.fidelity import Judge
from sbf_dist.compression.fitting.prior import prior_variances
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.refit import is_mended, linear_heads
from sbf_dist.compression.fitting.resuming import Route
from sbf_dist.compression.fitting.sequential import SequentialFit
from sbf_dist.compression.fitting.settle import settle
from sbf_dist.compression.holding_out import split
from sbf_dist.compression.narrow import narrow
from sbf_dist.compression.outputs import LOGITS, Yardstick
from sbf_dist.compression.plan import Removed
from sbf_dist.compression.recognition import weight_of
from sbf_dist.compression.removal.coupled import Coupled, find_coupled, removed_channels
from sbf_dist.compression.removal.elimination import orders_by_elimination
from sbf_dist.compression.removal.importance import Importance, has_scales, measure_importance
from sbf_dist.compression.removal.readers import solvable
from sbf_dist.compression.removal.removal_order import Order
from sbf_dist.compression.removal.widths import Measure, Widths, choose_channels, cost_of
from sbf_dist.errors import UserError
from sbf_dist.hooks import on_input, registered
from sbf_dist.settings import Compression
from sbf_dist.surgery import deep_copy, in_eval_mode

Criterion = Importance | Literal["reconstruction"]


@dataclass(frozen=True)
class Removal:
    """A narrowed network, in eval mode, and what was cut off.

    removed: by module name, what was cut off; left: layers of which no channel could be
    removed, and why ('' is the network as a whole); cost: of the narrowed network; fit: of its
    filters, where they were solved anew.
    """

    network: nn.Module
    removed: dict[str, Removed]
    left: dict[str, str]
    cost: Cost
    fit: SequentialFit | None = None

    def without_fit(self) -> "Removal":
        """Return it without its fit, whose passes hold features of all images."""
        return dataclasses.replace(self, fit=None)

    def remaining(self, dense: nn.Module) -> dict[str, list[int]]:
        """Numbers in `dense` of the channels that narrowed layers and batch norms have left."""
        channels: dict[str, list[int]] = {}
        for name, module in dense.named_modules():
            if name not in self.removed:
                continue
            gone = set(self.removed[name].out)
            if isinstance(module, nn.Conv2d | nn.Linear):
                channels[name] = [c for c in range(len(module.weight)) if c not in gone]
            elif isinstance(module, _BatchNorm):
                channels[name] = [c for c in range(module.num_features) if c not in gone]
        return channels


@dataclass(frozen=True)
class Removable:
    """What could be removed from a network, and how much that would matter."""

    dense: nn.Module  # a copy, in eval mode
    images: Calibration
    cost: Cost
    groups: list[Coupled]
    orders: list[Order]  # of each group's channels
    left: dict[str, str]
    yardstick: Yardstick


@torch.no_grad()
def find_removable(
    model: nn.Module,
    images: Tensor | Calibration,
    *,
    criterion: Criterion = "reconstruction",
    keep: tuple[str, ...] = (),
    seed: int = 0,
    yardstick: Yardstick = LOGITS,
) -> Removable:
    """Find the coupled channels of `model`, and in which order they go by `criterion`.

    'reconstruction' counts what is lost after the layers that read a group have been solved anew
    (`elimination`); where one of them is too wide for that, or grouped, what is lost without. The
    others are those of `importance`. `images` (N, C, H, W) are normalised calibration images.
    Groups with a layer whose name matches a pattern of `keep` (as in a shell: 'stages.0.*') are
    left whole, and so are the network's outputs, which `yardstick` measures. Raises UserError for a
    pattern that matches neither a convolution nor a linear layer.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kept_dense(model, [pattern for pattern in keep if not fnmatch.filter(linear, pattern)])
    dense = in_eval_mode(deep_copy(model))
    calibration = Calibration.of(images, device=device_of(model))
    groups, left = find_coupled(dense, calibration.first(2))
    groups, kept = _without(groups, keep)
    left |= kept
    if criterion == "bn_scale":
        without = [group for group in groups if not has_scales(dense, group)]
        left |= {group.name: "no batch norm scales its channels" for group in without}
        groups = [group for group in groups if has_scales(dense, group)]
    cost = count(dense, calibration.shape)
    orders = _orders(dense, groups, calibration, criterion, seed, yardstick)
    return Removable(dense, calibration, cost, groups, orders, left, yardstick)


def _orders(
    dense: nn.Module,
    groups: list[Coupled],
    images: Calibration,
    criterion: Criterion,
    seed: int,
    yardstick: Yardstick,
) -> list[Order]:
    if criterion != "reconstruction":
        scores = measure_importance(dense, groups, images, criterion, seed, yardstick)
        return [Order.of_scores(score) for score in scores]
    images, held = split(images)
    solved = [group for group in groups if solvable(dense, group)]
    others = [group for group in groups if not solvable(dense, group)]
    orders = iter(
        orders_by_elimination(dense, solved, images, held, seed, yardstick) if solved else []
    )
    roots = iter(
        measure_importance(dense, others, images, "fisher", seed, yardstick) if others else []
    )
    found = []
    for group in groups:
        if group in solved:
            found.append(next(orders))
        else:
            root = next(roots)
            channels = root.argsort(stable=True)
            # The root of the divergence of several is at most the sum of theirs.
            losses = root[channels].cumsum(0).square() / 2
            found.append(Order.of_losses(channels.tolist(), losses.numpy()))
    return found


def _nothing_to_remove(left: Mapping[str, str]) -> UserError:
    """Return the error that lists, with counts, why layers keep their channels."""
    reason = left.get("")
    if reason is not None:
        return UserError(
            f"removal: no channel can be removed: {reason}; removal = 0 rebuilds channels alone"
        )
    if not left:
        return UserError("removal: no channel can be removed: it has no layer that makes channels")
    why = with_counts(Counter(left.values()))
    return UserError(f"removal: no channel can be removed from its {len(left)} layers; {why}")


@torch.no_grad()
def remove(removable: Removable, settings: Compression, share: float) -> Removal:
    """Narrow a copy of the network until it costs `share` of what it did.

    The cost is what the budget of `settings` counts: multiply-adds or parameters. Those channels go
    that matter least for what they cost, which is counted anew after each step. Every group of
    coupled channels keeps at least `floor` of its channels, and a multiple of `round_to`. What
    reads the rest has the removed channels' means added to its bias; with `refit` the filters that
    are left are solved anew, in forward order, so that they give what they gave in the dense
    network. `finish` is what follows, unless layers are rebuilt as well. Raises UserError if the
    share cannot be reached.
    """
    of: Measure = "params" if settings.budget.kind == "params" else "macs"
    if not 0 < share <= 1:
        raise UserError(f"removal: share = {share:g} of {of} must lie in (0, 1]")
    dense, groups = removable.dense, removable.groups
    if not groups and share < 1:
        raise _nothing_to_remove(removable.left)
    limit = share * cost_of(removable.cost, of)
    # What no layer's widths say, such as products of features in attention, is counted at the end.
    excess = 0.0
    while True:
        widths = Widths(dense, groups, removable.cost, of)
        chosen = choose_channels(widths, removable.orders, settings, limit - excess)
        removed = removed_channels(list(zip(groups, chosen, strict=True)))
        network = deep_copy(dense)
        narrow(network, removed)
        after = count(network, removable.images.shape)
        over = cost_of(after, of) - limit
        if over <= 1e-9 * limit:
            break
        excess += over
    _absorb_means(dense, network, removed, removable.images)
    removal = Removal(network, removed, removable.left, after)
    if not removed or not settings.refit:
        return removal
    sides, reference = split(removable.images), Reference(dense, removal.remaining(dense))
    fit = _refit(network, reference, sides, removed, settings.feature_bytes)
    return dataclasses.replace(removal, fit=fit)


def finish(removal: Removal, removable: Removable, settings: Compression) -> Judge | None:
    """Move statistics of batch norms and solve linear layers anew, in place.

    Each if that brings the predictions nearer to the dense network's on images held out (`settle`).
    Not to be done before layers are rebuilt: what they are fitted to is read by batch norms as they
    are in the dense network.
    """
    images, held = split(removable.images)
    return settle(
        removal.network,
        Reference(removable.dense, removal.remaining(removable.dense)),
        images,
        held,
        refit=settings.refit,
        yardstick=removable.yardstick,
        fit=removal.fit,
    )


def _refit(
    network: nn.Module,
    reference: Reference,
    sides: tuple[Calibration, Calibration | None],
    removed: Mapping[str, Removed],
    memory: int,
) -> SequentialFit:
    """Solve the filters of the narrowed network anew, on the inputs that it gives them."""
    images, held = sides
    examples = images.first(2)
    found = uses(network, examples)
    # What comes before the first change gives what it gave.
    same = set(takewhile(lambda name: name not in removed, found))
    sizes = {
        name: 1
        for name, use in found.items()
        if name not in same and use.calls == 1 and is_mended(network, name, examples)
    }
    priors = prior_variances(network, list(sizes), images)
    layers = [*sizes, *linear_heads(network, examples)]
    route = Route.of(network, reference.module, images.first(3), layers, memory)
    fit = SequentialFit(
        network, reference, sizes, images, refit=True, held=held, priors=priors, route=route
    )
    for name in sizes:
        fit.mend(name)
    return fit


def _absorb_means(
    dense: nn.Module, network: nn.Module, removed: dict[str, Removed], images: Calibration
) -> None:
    """Add what removed channels bring on average to the biases of the layers that read them."""
    readers = {
        name: dense.get_submodule(name)
        for name, channels in removed.items()
        if channels.inp and network.get_submodule(name).bias is not None
    }
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def read(name: str, linear: bool) -> Callable[..., None]:
        def hook(_: nn.Module, given: Tensor) -> None:
            features = given.movedim(-1 if linear else 1, -1).flatten(0, -2)
            total = features.double().sum(0)
            sums[name] = sums[name] + total if name in sums else total
            counts[name] = counts.get(name, 0) + len(features)

        return hook

    hooks = (
        on_input(module, read(name, isinstance(module, nn.Linear)))
        for name, module in readers.items()
    )
    with registered(hooks):
        for batch in images:
            dense(batch)
    for name, total in sums.items():
        mean = total[removed[name].inp] / counts[name]
        weight = weight_of(readers[name])[:, removed[name].inp].double()
        shift = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
        gone = set(removed[name].out)
        rows = [row for row in range(len(weight)) if row not in gone]
        bias = network.get_submodule(name).get_parameter("bias")
        bias.add_((shift[rows] @ mean).to(bias))


def _without(groups: list[Coupled], keep: tuple[str, ...]) -> tuple[list[Coupled], dict[str, str]]:
    """Take the groups that compute channels of a layer matching `keep` out, with the reason."""
    rest, reasons = [], {}
    for group in groups:
        computed_by = [part.name for part in group.parts if part.side == "out"]
        matches = [p for p in keep if any(fnmatch.fnmatchcase(name, p) for name in computed_by)]
        if matches:
            reasons[group.name] = f"kept whole, as {matches[0]!r} asks"
        else:
            rest.append(group)
    return rest, reasons
