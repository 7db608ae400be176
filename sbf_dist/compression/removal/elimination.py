"""Which channels go where the layers that read them are solved anew, and what that costs.

Optimal brain surgeon (Hassibi and Stork 1993) for the channels of a group: what removing some costs
is counted after all other weights of their readers have made up for it as well as they can, on the
inputs that calibration images give them. Optimal Brain Compression (Frantar and Alistarh 2022,
arXiv 2208.11580, section 4) does the same for single weights.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.layerwise import Draw
from sbf_dist.compression.fitting.refit import drawn_patches
from sbf_dist.compression.outputs import LOGITS, Yardstick, run_backward
from sbf_dist.compression.planning.options import PROBES, TINY
from sbf_dist.compression.recognition import as_plain
from sbf_dist.compression.removal.coupled import Coupled
from sbf_dist.compression.removal.readers import Reader, readers_of
from sbf_dist.compression.removal.removal_order import Order
from sbf_dist.hooks import on_output

PART = 32  # of the channels that are left, about one in so many goes at a time
SHARES = (0.05, 0.2, 0.45, 0.75)  # of a group's channels, whose removal is tried
TRIALS = 256 * 2**20  # bytes of trials' weights that are held at a time
DRAWN = 256  # losses by which trials are measured, at least


@dataclass(frozen=True)
class Elimination:
    """The order in which a group's channels go, as far as its readers alone say.

    losses: by the first 1, 2, … of them, comparable within the group only.
    """

    channels: list[int]
    losses: np.ndarray


@dataclass(frozen=True)
class Trial:
    """What the weights and biases of a group's readers change by when some channels go."""

    channels: int
    changes: dict[str, tuple[Tensor, Tensor]]

    @property
    def bytes(self) -> int:
        """Memory that the weights take."""
        return sum(weight.nbytes for weight, _ in self.changes.values())


def orders_by_elimination(
    dense: nn.Module,
    groups: Sequence[Coupled],
    images: Calibration,
    held: Calibration | None,
    seed: int,
    yardstick: Yardstick = LOGITS,
) -> list[Order]:
    """Return for each group in which order its channels go, and the divergences it causes.

    The estimates along an order are scaled to what some trials, whose weights are solved on
    `images`, do to the network's outputs, as `yardstick` measures, on the images `held` out (on
    the same, without any).
    """
    found: list[Elimination] = []
    trials: list[list[Trial]] = []
    measured: list[list[float]] = []
    begun = 0
    for group, readers in readers_of(dense, groups, images, held, seed, yardstick):
        one = eliminate(readers, group.size)
        found.append(one)
        numbers = {max(1, min(group.size - 1, round(share * group.size))) for share in SHARES}
        trials.append([_trial(readers, one.channels[:number]) for number in sorted(numbers)])
        if sum(trial.bytes for row in trials[begun:] for trial in row) > TRIALS:
            measured += _divergences(dense, trials[begun:], held or images, seed, yardstick)
            # Only how many channels went is still needed of them.
            trials[begun:] = [[Trial(t.channels, {}) for t in row] for row in trials[begun:]]
            begun = len(trials)
    measured += _divergences(dense, trials[begun:], held or images, seed, yardstick)
    return [
        _scaled(one, [trial.channels for trial in row], losses)
        for one, row, losses in zip(found, trials, measured, strict=True)
    ]


def eliminate(readers: Sequence[Reader], size: int) -> Elimination:
    """Remove a group's channels one after the other, those first that cost the least then."""
    states = [_State(reader) for reader in readers]
    left = torch.arange(size)
    order: list[int] = []
    losses: list[float] = []
    lost = 0.0
    while len(left) > 0:
        scores = sum((state.scores(left) for state in states), torch.zeros(len(left)).double())
        ranked = scores.argsort(stable=True)[: max(1, len(left) // PART)]
        gone, single = left[ranked], scores[ranked].clamp(min=TINY)
        together = sum(state.remove(gone) for state in states)
        steps = (single / single.sum()).cumsum(0) * together
        losses += (lost + steps).tolist()
        lost += together
        order += gone.tolist()
        left = left[torch.isin(left, gone, invert=True)]
    return Elimination(order, np.array(losses))


class _State:
    """The weights of one reader, and the inverse of its Gram matrix, while channels go."""

    def __init__(self, reader: Reader) -> None:
        self._columns = reader.columns
        self._weight = reader.weight * reader.sensitivity.sqrt()[:, None]
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(reader.regular_gram()))

    def scores(self, channels: Tensor) -> Tensor:
        """Return what each of `channels` costs if it goes next."""
        columns = self._columns[channels]  # (n, t)
        blocks = self._inverse[columns[:, :, None], columns[:, None, :]]
        weights = self._weight[:, columns].permute(1, 2, 0)
        return (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))

    def remove(self, channels: Tensor) -> float:
        """Remove channels, solve what is left anew, and return what that costs."""
        columns = self._columns[channels].flatten()
        across = self._inverse[:, columns]
        weights = self._weight[:, columns]
        solved = torch.linalg.solve(across[columns], across.T)
        lost = float((weights * torch.linalg.solve(across[columns], weights.T).T).sum())
        self._weight.addmm_(weights, solved, alpha=-1)
        self._inverse.addmm_(across, solved, alpha=-1)
        return max(lost, 0.0)


def _trial(readers: Sequence[Reader], channels: list[int]) -> Trial:
    changes = {reader.name: reader.without(torch.tensor(channels)) for reader in readers}
    return Trial(len(channels), changes)


def _divergences(
    dense: nn.Module,
    trials: Sequence[Sequence[Trial]],
    images: Calibration,
    seed: int,
    yardstick: Yardstick,
) -> list[list[float]]:
    """Estimate the divergence that each trial causes, as `planning.divergence` does.

    The readers of a group change together: their products are summed before they are squared.
    """
    if not trials:
        return []
    draws = max(1, round(DRAWN / images.count))
    totals = [torch.zeros(len(row), dtype=torch.double) for row in trials]
    products: dict[tuple[int, int], Tensor] = {}
    users: dict[str, list[tuple[int, int, Tensor, Tensor]]] = {}
    for group, row in enumerate(trials):
        for index, trial in enumerate(row):
            for name, (weight, bias) in trial.changes.items():
                users.setdefault(name, []).append((group, index, weight, bias))

    def measure(name: str) -> Callable[[nn.Module], RemovableHandle]:
        module = dense.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            module = as_plain(module)  # it is not recognised once it has the hooks of this measure

        def hook(_: nn.Module, given: Tensor, output: Tensor) -> Tensor:
            # A hook that knew `output` would keep the graph that keeps the hook.
            # Under an autocast of the network's own, they are of another type than the weights.
            features = given.detach().to(module.get_parameter("weight"))

            def backward(gradient: Tensor) -> None:
                with torch.no_grad():
                    # What all trials have in common: of each image, sums over positions.
                    rows, slopes = _rows(module, features), _by_position(module, gradient)
                    pairs = (slopes.mT.to(rows) @ rows).flatten(1)
                    sums = slopes.to(rows).sum(1)
                    for group, index, weight, bias in users[name]:
                        product = pairs @ weight.to(pairs).flatten() + sums @ bias.to(pairs)
                        product = product.double().cpu()
                        key = (group, index)
                        products[key] = products[key] + product if key in products else product

            output.register_hook(backward)
            return output.clone()  # which an activation may overwrite in place

        return lambda layer: on_output(layer, hook)

    hooks = {name: measure(name) for name in users}
    batches = images.parts(max(2, images.part // 2), PROBES)
    count = 0
    for passed in run_backward(dense, hooks, batches, yardstick, seed=seed, draws=draws):
        for (group, index), product in products.items():
            totals[group][index] += float(product.square().sum()) / 2
        products.clear()
        count += passed
    return [(total / count).tolist() for total in totals]


def _rows(module: nn.Module, features: Tensor) -> Tensor:
    """Lay out what one output of a layer is made of as (N, positions, weights)."""
    if not isinstance(module, nn.Conv2d):
        return _by_position(module, features)
    every = Draw("", len(features), sys.maxsize)
    patches = drawn_patches(module, features, every, 0)
    return patches.view(len(features), -1, patches.shape[1])


def _by_position(module: nn.Module, features: Tensor) -> Tensor:
    """Lay out (N, C, H, W), or (N, …, C) of a linear layer, as (N, positions, C)."""
    if isinstance(module, nn.Conv2d):
        return features.flatten(2).mT
    return features.reshape(len(features), -1, features.shape[-1])


def _scaled(found: Elimination, numbers: list[int], divergences: list[float]) -> Order:
    """Scale the losses along an order to the divergences that trials of some numbers cause."""
    losses = found.losses.clip(TINY)
    scales = [
        math.log(max(divergence, TINY) / losses[number - 1])
        for number, divergence in zip(numbers, divergences, strict=True)
    ]
    steps = np.arange(1, len(losses) + 1)
    scaled = losses * np.exp(np.interp(steps, numbers, scales))
    return Order.of_losses(found.channels, np.maximum.accumulate(scaled))
