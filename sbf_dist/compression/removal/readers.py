"""The layers that read a group's channels: what they see, and how well they do without some."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.candidates import LARGEST_GRAM
from sbf_dist.compression.fitting.layerwise import SUMS, Draw, visit
from sbf_dist.compression.fitting.prior import floored, prior_variances
from sbf_dist.compression.fitting.refit import RIDGE, drawn_patches
from sbf_dist.compression.fitting.statistics import Moments, MomentSums, output_sensitivity
from sbf_dist.compression.outputs import LOGITS, Yardstick
from sbf_dist.compression.recognition import Recognised, as_plain, recognise
from sbf_dist.compression.removal.coupled import Coupled, Part

ORDERING_RIDGE = 0.03  # of each input's variance, by which channels are put in order
RIDGES = (1e-2, 1e-1, 1.0, 10.0)  # of trials' weights, to choose from on images held out
SENSITIVE = 256  # images on which sensitivities are measured


@dataclass(frozen=True)
class Reader:
    """A layer that reads a group's channels, as a matrix of weights (C, n) on rows of inputs.

    columns: (channels, t), which inputs each of the group's channels is; gram, held: second
    moments of the inputs, (n, n), on the images to fit to and on those held out; mean, held_mean:
    (n,); variance: (n,) of each input, floored by the prior; sensitivity: (C,), of the outputs.
    """

    name: str
    weight: Tensor
    shape: torch.Size
    columns: Tensor
    gram: Tensor
    mean: Tensor
    held: Tensor | None
    held_mean: Tensor | None
    variance: Tensor
    sensitivity: Tensor

    def regular_gram(self) -> Tensor:
        """Return the Gram matrix with the ridge by which channels are put in order."""
        return self.gram + torch.diag(ORDERING_RIDGE * self.variance + self._least())

    def without(self, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what weight and bias (C,) change by when channels go, as single precision.

        The other weights are solved anew. How far they may leave the old ones is chosen by the
        error on the images held out.
        """
        gone = self.columns[channels].flatten()
        kept = torch.ones(len(self.gram), dtype=torch.bool)
        kept[gone] = False
        left = kept.nonzero()[:, 0]
        right = self.gram[left][:, gone] @ self.weight[:, gone].T
        system = self.gram[left][:, left]
        best, least = None, math.inf
        for ridge in (RIDGE,) if self.held is None else RIDGES:
            change = -self.weight.clone()
            change[:, left] = 0
            added = torch.diag(ridge * self.variance[left] + self._least())
            factor = torch.linalg.cholesky(system + added)
            change[:, left] = torch.cholesky_solve(right, factor).T
            lost = self._lost(change)
            if best is None or lost < least:
                best, least = change, lost
        assert best is not None
        return best.view(self.shape).float(), (-best @ self.mean).float()

    def _lost(self, change: Tensor) -> float:
        gram = self.gram if self.held is None else self.held
        error = ((change @ gram) * change).sum(1)
        if self.held_mean is not None:
            error += (change @ (self.held_mean - self.mean)).square()
        return float((self.sensitivity * error).sum())

    def _least(self) -> float:
        return 1e-9 * float(self.variance.mean()) + torch.finfo(torch.double).tiny ** 0.5


def solvable(dense: nn.Module, group: Coupled) -> bool:
    """Whether the weights of all layers that read the group's channels can be solved anew."""
    for part in _reading(group):
        module = dense.get_submodule(part.name)
        known = recognise(module) if isinstance(module, nn.Conv2d) else None
        is_plain = isinstance(module, nn.Linear) or (
            isinstance(known, Recognised) and known.own and known.conv.groups == 1
        )
        even = len({len(numbers) for numbers in part.channels}) == 1
        if not (is_plain and even and _width(module) <= LARGEST_GRAM):
            return False
    return True


def readers_of(
    dense: nn.Module,
    groups: Sequence[Coupled],
    images: Calibration,
    held: Calibration | None,
    seed: int,
    yardstick: Yardstick = LOGITS,
) -> Iterator[tuple[Coupled, list[Reader]]]:
    """Give each group, in order, with its readers; all groups must be `solvable`.

    Take them as they come: no more than SUMS bytes of matrices are held, or those of one group.
    """
    names = list(dict.fromkeys(part.name for group in groups for part in _reading(group)))
    sensitivity = output_sensitivity(
        dense, names, lambda: images.parts(images.part, SENSITIVE), seed, yardstick
    )
    priors = prior_variances(dense, names, images)
    for run in _runs(dense, groups, SUMS if held is None else SUMS // 2):
        read = list(dict.fromkeys(part.name for group in run for part in _reading(group)))
        moments = _input_moments(dense, read, images)
        apart = {} if held is None else _input_moments(dense, read, held)
        for group in run:
            readers = []
            for part in _reading(group):
                name, module = part.name, dense.get_submodule(part.name)
                prior, own = priors.get(name), moments[name]
                readers.append(
                    _reader(part, module, own, apart.get(name), sensitivity[name], prior)
                )
            yield group, readers


def _reader(
    part: Part,
    module: nn.Module,
    moments: Moments,
    held: Moments | None,
    sensitivity: Tensor,
    prior: Tensor | None,
) -> Reader:
    weight = module.get_parameter("weight").detach()
    taps = weight[0, 0].numel()
    variance = moments.zz.diagonal().view(-1, taps).mean(1)
    columns = torch.tensor(part.channels)[:, :, None] * taps + torch.arange(taps)
    return Reader(
        name=part.name,
        weight=weight.double().cpu().flatten(1),
        shape=weight.shape,
        columns=columns.flatten(1),
        gram=moments.zz,
        mean=moments.z_mean,
        held=None if held is None else held.zz,
        held_mean=None if held is None else held.z_mean,
        variance=floored(variance, prior).repeat_interleave(taps),
        sensitivity=sensitivity,
    )


@torch.no_grad()
def _input_moments(
    dense: nn.Module, names: Sequence[str], images: Calibration
) -> dict[str, Moments]:
    """Gather the second moments of what layers read, at positions that are drawn."""
    sums = {name: MomentSums(1, paired=False) for name in names}
    drawn: dict[str, Draw] = {}
    layers = {name: dense.get_submodule(name) for name in names}
    plain = {n: as_plain(layer) for n, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    start = 0

    def add(name: str, inputs: Tensor, output: Tensor) -> None:
        if name in plain:
            of = output[0, 0].numel()
            if name not in drawn:
                drawn[name] = Draw.of(name, _width(plain[name]), of, images.count)
            if start >= drawn[name].images:
                return
            rows = drawn_patches(plain[name], inputs, drawn[name], start)
        else:
            rows = inputs.flatten(0, -2).clone()
        sums[name].add(rows, rows.new_empty(len(rows), 0))

    for batch in images.parts(images.part):
        visit(dense, batch, {name: partial(add, name) for name in names})
        start += len(batch)
        if all(name in drawn and start >= drawn[name].images for name in names):
            break
    return {name: one.moments(name) for name, one in sums.items()}


def _runs(dense: nn.Module, groups: Sequence[Coupled], most: int) -> Iterator[list[Coupled]]:
    """Cut groups into runs whose readers' matrices take at most `most` bytes."""
    run: list[Coupled] = []
    held = 0
    for group in groups:
        size = sum(8 * _width(dense.get_submodule(part.name)) ** 2 for part in _reading(group))
        if run and held + size > most:
            yield run
            run, held = [], 0
        run.append(group)
        held += size
    if run:
        yield run


def _reading(group: Coupled) -> list[Part]:
    return [part for part in group.parts if part.side == "inp"]


def _width(module: nn.Module) -> int:
    """Return how many inputs one output of a layer is made of."""
    return module.get_parameter("weight")[0].numel()
