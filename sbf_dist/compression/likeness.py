"""Whether images are like those that a network knows, by the statistics of its batch norms.

A wrong mean, values of another range or swapped colours leave a network that still runs, and is
fitted to what it never saw. Its first batch norms remember how their inputs were distributed.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.hooks import on_input, registered
from sbf_dist.layout import contiguous
from sbf_dist.surgery import deep_copy, in_eval_mode

logger = logging.getLogger(__name__)

SAMPLE = 32  # images that are looked at, evenly taken from all
TRIED = 16  # of them, on which a cause is looked for
NORMS = 2  # batch norms that are asked: the first that a forward pass reaches
FAR = 0.4  # nats, from which on images are said to be far from what is known
CURED = 0.25  # of the divergence: what a change of the images must leave to be named as the cause
LEAST = 1e-3  # of the mean variance: channels that vary less say nothing
# Swapped colours move means of channels, and little else: their squares, in units of the variance,
# must become less by this share and by this amount.
SWAP_SHARE, SWAP_LEAST = 0.4, 0.01
# Of the squares of pixels' differences from their neighbours, to twice the pixels' variance: noise
# has 1, photographs have below 0.2.
NOISE = 0.8
SPAN = 0.2  # of values in 0 … 1: what images have at least, written in the scale that they are in

Colours = tuple[float, float, float]


class UnlikeImages(UserWarning):
    """Images that are not like those that a network knows."""


@dataclass(frozen=True)
class Scale:
    """A way to write the values of images: of x in 0 … 1 it is (x - mean) / std."""

    name: str
    mean: Colours
    std: Colours


SCALES = (
    Scale("0 … 1", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    Scale("0 … 255", (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    Scale("mean 0.5 and std 0.5", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    Scale("ImageNet's mean and std", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    Scale("ImageNet's mean, 0 … 255", (0.485, 0.456, 0.406), (1 / 255, 1 / 255, 1 / 255)),
)
# Of other normalisations of values in 0 … 1, of all channels alike.
MEANS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
STDS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
SMALLER = (0.004, 0.008, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
LARGER = (1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 128.0, 255.0)


class _Reached(Exception):  # noqa: N818  (it is control flow, not an error)
    """Raised by a hook to leave a forward pass once all norms have been reached."""


@dataclass(frozen=True)
class Distance:
    """How far images are from what a network knows.

    nats: divergence of a channel's distribution, taken to be normal, from the running statistics;
    the median of channels, of the batch norm `at`, where it is largest. shift: squared difference
    of the means, in units of the variance; the mean of the first batch norm's channels.
    """

    nats: float
    shift: float
    at: str


def warn_of_unlike(model: nn.Module, images: Calibration) -> None:
    """Warn, in one line, if `images` are not like those that `model` knows."""
    message = what_is_unlike(model, images)
    if message is not None:
        # A place that is no file: the message concerns no line of code.
        warnings.warn_explicit(message, UnlikeImages, "sbf_dist", 0, module="sbf_dist")


@torch.no_grad()
def what_is_unlike(model: nn.Module, images: Calibration) -> str | None:
    """Say in one line what about `images` is not what `model` knows, and the likely cause.

    None where nothing is, or nothing can be known: without batch norms that have seen images.
    It is asked of a copy: modes may be more than flags, which `train` may change weights for.
    """
    sample = _sample(images)
    constant = _what_is_constant(sample)
    if constant is not None:
        return f"calibration images: {constant}"
    model = in_eval_mode(deep_copy(model))
    norms = _first_norms(model, sample[:1])
    if not norms:
        return None
    found = distance(model, norms, sample)
    if found.nats > FAR:
        return (
            f"calibration images: their statistics are far from what the network knows "
            f"({found.nats:.2g} nats at {found.at}); "
            f"{_cause(model, norms, sample[:: max(1, len(sample) // TRIED)])}"
        )
    swapped = _swapped(model, norms, sample, found)
    if swapped is None:
        return None
    return (
        "calibration images: red and blue may be swapped; swapped back, their mean is nearer to "
        f"what the network knows ({swapped.shift:.2g} instead of {found.shift:.2g} variances at "
        f"{next(iter(norms))})"
    )


def distance(model: nn.Module, norms: dict[str, nn.Module], sample: Tensor) -> Distance:
    """Return how far the inputs of `norms` are from their running statistics."""
    found: dict[str, Distance] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(norm: nn.Module, given: Tensor) -> None:
            found[name] = _at(name, norm, given)
            if len(found) == len(norms):
                raise _Reached

        return hook

    hooks = (on_input(norm, look(name)) for name, norm in norms.items())
    with registered(hooks), suppress(_Reached):
        model(sample)
    farthest = max(found.values(), key=lambda one: one.nats)
    return Distance(farthest.nats, found[next(iter(norms))].shift, farthest.at)


def _at(name: str, norm: nn.Module, inputs: Tensor) -> Distance:
    known_mean, known = (_statistic(norm, key).double() for key in ("running_mean", "running_var"))
    rows = inputs.transpose(0, 1).flatten(1).double()
    mean, variance = rows.mean(1), rows.var(1, correction=0)
    least = LEAST * known.mean() + getattr(norm, "eps", 0.0)
    ratio = (variance + least) / (known + least)
    shift = (mean - known_mean).square() / (known + least)
    nats = (shift + ratio - 1 - ratio.log()) / 2
    return Distance(float(nats.median().nan_to_num(math.inf)), float(shift.mean()), name)


def _cause(model: nn.Module, norms: dict[str, nn.Module], sample: Tensor) -> str:
    """Name the change of the images that brings them near, if there is one."""
    rough = _roughness(sample) > NOISE
    noise = "neighbouring pixels are uncorrelated: are they noise?"
    now = distance(model, norms, sample).nats
    best, cause = min(FAR, CURED * now), ""
    for changes in (
        _rescalings(sample),
        _multiples(sample),
        _normalisations(sample),
        _standardised(sample),
    ):
        tried = [(distance(model, norms, changed).nats, name) for name, changed in changes]
        least, name = min(tried, default=(math.inf, ""))
        # What says more comes first: it is only given up for what is much nearer.
        if least < (CURED * best if cause else best):
            best, cause = least, name
    if cause:
        return f"{cause} they are near ({best:.2g})" + (f"; but {noise}" if rough else "")
    return (
        noise
        if rough
        else "no other scale of their values explains it: are they images of another kind?"
    )


def _rescalings(sample: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Write images in other scales than the one that they may be in."""
    if sample.shape[1] != 3:
        return
    for now in SCALES:
        plain = sample * _colours(now.std, sample) + _colours(now.mean, sample)
        low, high = float(plain.min()), float(plain.max())
        if low < -0.02 or high > 1.02 or high - low < SPAN:
            continue
        for other in SCALES:
            if other is not now:
                changed = (plain - _colours(other.mean, sample)) / _colours(other.std, sample)
                yield f"normalised by {other.name} instead of {now.name}", changed


def _multiples(sample: Tensor) -> Iterator[tuple[str, Tensor]]:
    for factor in (*SMALLER, *LARGER):
        yield f"multiplied by {factor:g}", factor * sample


def _normalisations(sample: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Normalise images of any number of channels that are not, by other means and stds."""
    for name, unit in (("0 … 1", 1.0), ("0 … 255", 255.0)):
        plain = sample / unit
        low, high = float(plain.min()), float(plain.max())
        if low < -0.02 or high > 1.02 or high - low < SPAN:
            continue
        for mean in MEANS:
            for std in STDS:
                changed = (plain - mean) / std
                yield f"normalised by mean {mean:g}, std {std:g} or so instead of {name}", changed


def _standardised(sample: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Normalise images by their own mean and std."""
    variance, mean = torch.var_mean(sample.double(), correction=0)
    std = float(variance.sqrt())
    if 0 < std < math.inf:
        now = f"mean {float(mean):.3g} and std {std:.3g}"
        yield f"normalised to mean 0 and std 1 instead of {now}", (sample - float(mean)) / std


def _roughness(sample: Tensor) -> float:
    """Return how much neighbouring pixels differ: 1 if they have nothing in common, 0 if alike.

    The mean square of their differences, in units of twice the variance of an image's pixels.
    """
    planes = sample.double().flatten(0, 1)
    variance = planes.var((1, 2), correction=0).mean()
    steps = [planes.diff(dim=axis).square().mean() for axis in (1, 2) if planes.shape[axis] > 1]
    if not steps or variance == 0:
        return 0.0
    return float(torch.stack(steps).mean() / (2 * variance))


def _swapped(
    model: nn.Module, norms: dict[str, nn.Module], sample: Tensor, now: Distance
) -> Distance | None:
    """Return how far the images are with red and blue swapped, if that is clearly nearer."""
    if sample.shape[1] != 3:
        return None
    swapped = distance(model, norms, sample.flip(1))
    gain = now.shift - swapped.shift
    return swapped if gain > max(SWAP_LEAST, SWAP_SHARE * now.shift) else None


def _colours(values: Colours, like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype)[:, None, None]


def _sample(images: Calibration) -> Tensor:
    """Return SAMPLE of the images, evenly taken from all, or all if there are fewer."""
    step = max(1, images.count // SAMPLE)
    taken, start = [], 0
    for batch in images:
        taken.append(batch[-start % step :: step].clone())  # of a buffer that may be reused
        start += len(batch)
        if start > (SAMPLE - 1) * step:
            break
    return contiguous(torch.cat(taken)[:SAMPLE])  # as every network can read it


def _what_is_constant(sample: Tensor) -> str | None:
    values = sample.double().flatten(1)
    size = float(values.abs().max())
    if len(sample) > 1 and float((values - values[0]).abs().max()) <= 1e-6 * size:
        return "they are all the same image"
    planes = sample.double().flatten(2)
    if float((planes.amax(2) - planes.amin(2)).max()) <= 1e-6 * size:
        return "each of them has one colour only"
    return None


def _first_norms(model: nn.Module, image: Tensor) -> dict[str, nn.Module]:
    """Return the first batch norms that a forward pass reaches, if they have seen images."""
    reached: dict[str, nn.Module] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(norm: nn.Module, given: Tensor) -> None:
            if given.ndim == 4:
                reached.setdefault(name, norm)

        return hook

    norms = {name: module for name, module in model.named_modules() if _has_statistics(module)}
    hooks = (on_input(norm, note(name)) for name, norm in norms.items())
    try:
        with registered(hooks):
            model(image)
    except Exception as error:  # which the planner meets as well, and reports
        logger.debug("%s cannot take the images: %s", type(model).__name__, error)
        return {}
    first = dict(list(reached.items())[:NORMS])
    return {} if any(_is_fresh(norm) for norm in first.values()) else first


def _has_statistics(module: nn.Module) -> bool:
    """Whether it is a batch norm that remembers: PyTorch's or timm's, or a frozen one."""
    return all(
        isinstance(getattr(module, key, None), Tensor) for key in ("running_mean", "running_var")
    )


def _is_fresh(norm: nn.Module) -> bool:
    mean, variance = _statistic(norm, "running_mean"), _statistic(norm, "running_var")
    return not bool(mean.any()) and bool((variance == 1).all())


def _statistic(norm: nn.Module, key: str) -> Tensor:
    value = getattr(norm, key)
    assert isinstance(value, Tensor)
    return value
