"""Filters solved anew by least squares, on the inputs that a converted network really gives.

What the layers before a convolution have spoiled is mended by its own filters as far as these can:
they are fitted to what the dense network's layer gives, whatever their inputs now are.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.candidates import LARGEST_GRAM, convolution
from sbf_dist.compression.fitting.layerwise import Draw
from sbf_dist.compression.fitting.prior import floored, prior_variances
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.resuming import Side
from sbf_dist.compression.fitting.statistics import Moments, MomentSums, patches, run_until
from sbf_dist.compression.inputs import input_shapes
from sbf_dist.compression.recognition import recognise
from sbf_dist.hooks import is_altered, on_output, registered
from sbf_dist.padding import pad_of
from sbf_dist.surgery import sharing_modules

RIDGE = 1e-2  # towards the old filters, relative to the variance of each input channel
# To choose from on images that are held out; the last leaves the filters as they are.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)
# Of the mean variance of all inputs: a channel that varies less is held where it is.
FLOOR = 1e-6


def obstacle(conv: nn.Conv2d) -> str | None:
    """Tell why the filters of `conv` cannot be solved anew, if they cannot."""
    known = recognise(conv)
    if isinstance(known, str):
        return known
    if not known.own:
        return "its filters are computed from other weights"
    if conv.groups > 1:
        return f"grouped convolution ({conv.groups} groups)"
    width = conv.weight[0].numel()
    if width > LARGEST_GRAM:
        return f"a filter has {width} weights, more than {LARGEST_GRAM}"
    return None


def is_mended(model: nn.Module, name: str, images: Tensor) -> bool:
    """Tell whether a layer that stays dense can profit.

    Not the stem, which reads the images; nor a layer whose weights others use, or that it computes.
    """
    conv = convolution(model, name)
    if name in sharing_modules(model):
        return False
    of_images = {shape[0] for shape in input_shapes(model, images) if len(shape) == 3}
    return conv.in_channels not in of_images and obstacle(conv) is None


@torch.no_grad()
def filter_moments(
    conv: nn.Conv2d, batches: Iterable[tuple[int, Tensor, Tensor]], draw: Draw
) -> Moments:
    """Gather the moments of what the filters of `conv` see and of targets for their outputs.

    `batches` give the number of the first image, inputs (N, C, H, W), and the rows (n, C') of
    targets at the positions of `draw`.
    """
    sums = MomentSums(1, paired=False)
    for start, inputs, targets in batches:
        sums.add(drawn_patches(conv, inputs, draw, start), targets)
    return sums.moments(draw.name)


def output_moments(seen: Moments, weight: Tensor) -> Moments:
    """Return the moments of what filters give without a bias, as candidates for the same targets.

    seen: what the filters see, as `filter_moments` gathers it; weight: (C, C_in, k, k), of as many
    filters as there are targets.
    """
    filters = weight.detach().flatten(1).double().cpu()
    zz, zy = filters @ seen.zz @ filters.T, filters @ seen.zy
    return Moments(
        zz=zz,
        zy=zy,
        yy=seen.yy.clone(),
        z_mean=filters @ seen.z_mean,
        y_mean=seen.y_mean.clone(),
        drift=(seen.yy + zz.diagonal() - 2 * zy.diagonal()).clamp(min=0),
        size=1,
    )


def drawn_patches(conv: nn.Conv2d, inputs: Tensor, draw: Draw, start: int) -> Tensor:
    """Lay out what the filters of `conv` see at the positions of `draw` as rows (n, C·k·k)."""
    inputs = inputs[: max(0, draw.images - start)]
    pad = pad_of(conv)
    if pad is not None:
        inputs = pad(inputs)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(inputs, conv._reversed_padding_repeated_twice, mode)
    sizes = [
        (side - d * (k - 1) - 1) // s + 1
        for side, k, s, d in zip(
            padded.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True
        )
    ]
    positions = draw.positions(start, len(inputs), sizes[0] * sizes[1])
    return patches(padded, conv.kernel_size, positions, conv.stride, conv.dilation)  # type: ignore[arg-type]


class NormalEquations:
    """What solving the filters of a layer anew has in common for all ridges: see `solve`."""

    def __init__(
        self,
        moments: Moments,
        weight: Tensor,
        *,
        centred: bool = True,
        prior: Tensor | None = None,
    ) -> None:
        self._means = moments.z_mean, moments.y_mean
        self._shape = weight.shape
        self._old = weight.detach().flatten(1).double().cpu()
        gram, cross = moments.zz, moments.zy
        if not centred:
            gram = gram.addr(moments.z_mean, moments.z_mean)
            cross = cross.addr(moments.z_mean, moments.y_mean)
        self._gram = gram
        self._left = cross - gram @ self._old.T
        variance = floored(gram.diagonal().view(weight.shape[1], -1).mean(1), prior)
        self._floor = FLOOR * variance.mean() + torch.finfo(torch.double).tiny ** 0.5
        self._variance = variance.repeat_interleave(weight[0, 0].numel())

    def solution(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Return weight and bias; with an infinite `ridge` the weight is the old one."""
        new = self._old
        if ridge < math.inf:
            new = new + torch.cholesky_solve(self._left, self._factor(ridge)).T
        z_mean, y_mean = self._means
        return new.view(self._shape), y_mean - new @ z_mean

    def _factor(self, ridge: float) -> Tensor:
        # Wide layers' matrices take 170 MB each: that of the equations is freed before solving.
        matrix = self._gram.clone()
        matrix.diagonal().add_(ridge * self._variance + self._floor)
        return torch.linalg.cholesky(matrix)


def solve(
    moments: Moments,
    weight: Tensor,
    *,
    centred: bool = True,
    ridge: float = RIDGE,
    prior: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return weight and bias that explain the targets of `moments`, near to the old `weight`.

    Each input channel is held by its own variance, or by the larger one of the `prior` (C_in,):
    behind ReLU6 they differ by ten thousand. With `centred`, means are left to the bias; else the
    filters have to explain them too.
    """
    return NormalEquations(moments, weight, centred=centred, prior=prior).solution(ridge)


def best_solution(
    fit: Moments,
    held: Moments,
    weight: Tensor,
    *,
    centred: bool = True,
    prior: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `solve` gives on `fit` with that of RIDGES that leaves the least error on `held`.

    From the largest down, up to where the error grows. Channels count alike, as shares of their
    variance: norms and filters behind them scale them.
    """
    scale = held.yy + 0.01 * held.yy.mean() + torch.finfo(torch.double).tiny ** 0.5
    equations = NormalEquations(fit, weight, centred=centred, prior=prior)
    best, least = None, math.inf
    for ridge in reversed(RIDGES):  # of equals the last: nothing is changed without a gain
        solution = equations.solution(ridge)
        lost = float((_errors(solution, held) / scale).sum())
        if best is None or lost < least:
            best, least = solution, lost
        elif lost > least:
            break
    assert best is not None
    return best


@torch.no_grad()
def refit_heads(
    student: nn.Module,
    reference: Reference,
    images: Calibration,
    sides: tuple[Side, Side] | None = None,
    priors: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Fit the linear layers of `student` that read vectors, in place; return their names.

    Each is fitted, in forward order, to what the layer gives in `reference`, on the inputs that
    `student` gives it. An image is one sample, and there may be fewer of them than weights. So how
    near to the old weights the new ones stay is chosen on images that are held out: `sides` are
    passes over `images` and over these, which have not gone beyond the first such layer. Without
    them it is chosen by what solutions of one half of the batches are worth on the other. `priors`
    say how much the layers' inputs varied in training; by default it is measured on `student`,
    where there are `sides`.
    """
    names = linear_heads(student, images.first(2))
    if priors is None:
        priors = {} if sides is None else prior_variances(student, names, images)
    for name in names:
        head = student.get_submodule(name)
        assert isinstance(head, nn.Linear)
        solution = (
            _from_halves(student, reference, name, images)
            if sides is None
            else _from_held(reference, name, sides, priors.get(name))
        )
        if solution is None:
            continue
        head.weight.copy_(solution[0])
        if head.bias is not None:
            head.bias.copy_(solution[1])
    return names


def _from_held(
    reference: Reference, name: str, sides: tuple[Side, Side], prior: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Solve a head on the images of the first side, with the ridge that is best on the second."""
    moments = []
    for side in sides:
        sums = MomentSums(1, paired=False)
        count = side.student.images.count
        given, wanted = side.student.inputs(name, count), side.reference.outputs_of(name, count)
        for inputs, outputs in zip(given, wanted, strict=True):
            sums.add(inputs.clone(), reference.select(name, outputs))
        moments.append(sums.moments(name))
    weight = sides[0].student.model.get_submodule(name).get_parameter("weight")
    return best_solution(moments[0], moments[1], weight, prior=prior)


def _from_halves(
    student: nn.Module, reference: Reference, name: str, images: Calibration
) -> tuple[Tensor, Tensor] | None:
    """Solve a head on all images; None where there are too few for two halves."""
    weight = student.get_submodule(name).get_parameter("weight")
    halves = [MomentSums(1, paired=False), MomentSums(1, paired=False)]
    for index, batch in enumerate(images.parts(min(images.part, -(-images.count // 2)))):
        halves[index % 2].add(*_vectors(student, reference, name, batch))
    if halves[1].count == 0:
        return None
    one, other = (half.moments(name) for half in halves)
    of_one, of_other = (NormalEquations(half, weight) for half in (one, other))

    def lost(ridge: float) -> float:
        return float(
            _errors(of_one.solution(ridge), other).sum()
            + _errors(of_other.solution(ridge), one).sum()
        )

    shares = [half.count / images.count for half in halves]
    ridge = min(reversed(RIDGES), key=lost)
    return solve(_joined(one, other, shares), weight, ridge=ridge)


def _vectors(
    student: nn.Module, reference: Reference, name: str, batch: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a head's inputs in the student, and the outputs that it is to give for them."""
    wanted = reference.select(name, run_until(reference.module, name, batch, output=True))
    return run_until(student, name, batch, output=False).clone(), wanted


def linear_heads(model: nn.Module, images: Tensor) -> list[str]:
    """Names of the linear layers, in forward order, that can be solved anew: see `refit_heads`."""
    shared = sharing_modules(model)
    inputs: list[tuple[str, int]] = []
    hooks = (
        on_output(module, lambda _, given, __, name=name: inputs.append((name, given.ndim)))
        for name, module in model.named_modules()
        if name not in shared and _is_plain(module)
    )
    with registered(hooks):
        model(images)
    names = [name for name, _ in inputs]
    return [name for name, axes in inputs if axes == 2 and names.count(name) == 1]


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer, not too wide, whose weight is all that it multiplies by.

    Masks and norms of weights compute that from others, and hooks may change what the layer gives.
    """
    return (
        type(module) is nn.Linear
        and module.in_features <= LARGEST_GRAM
        and "weight" in module._parameters
        and not is_altered(module)
    )


def _errors(solution: tuple[Tensor, Tensor], moments: Moments) -> Tensor:
    """Mean squared error of each target (C,) of weight and bias on other moments."""
    weight, bias = solution[0].flatten(1), solution[1]
    explained = 2 * (weight.T * moments.zy).sum(0) - ((weight @ moments.zz) * weight).sum(1)
    shift = moments.y_mean - weight @ moments.z_mean - bias
    return moments.yy - explained + shift.square()


def _joined(one: Moments, other: Moments, shares: list[float]) -> Moments:
    """Moments of two sets of rows as of one; `shares` are how many of the rows each has."""
    a, b = shares
    z, y = one.z_mean - other.z_mean, one.y_mean - other.y_mean
    return Moments(
        zz=a * one.zz + b * other.zz + a * b * torch.outer(z, z),
        zy=a * one.zy + b * other.zy + a * b * torch.outer(z, y),
        yy=a * one.yy + b * other.yy + a * b * y.square(),
        z_mean=a * one.z_mean + b * other.z_mean,
        y_mean=a * one.y_mean + b * other.y_mean,
        drift=one.drift,
        size=1,
    )
