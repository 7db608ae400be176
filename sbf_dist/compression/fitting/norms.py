"""Statistics of batch norms moved by what conversion changed, never measured anew.

What a network has learnt of its own images stays: only the difference that a changed layer makes
on the same images is added. So a layer that gives what it gave leaves them as they are, whatever
the images.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.hooks import on_input, registered
from sbf_dist.layers import SBFConv2d

LEAST = 1e-3  # of the mean variance: channels that vary less say nothing about a ratio
MOST = 2.0  # by which a channel's standard deviation may have changed
MOST_IMAGES = 128  # to compare: all their positions count, more images hardly move a mean


def following_norms(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Map each convolution or SBF layer to the batch norm that reads its very output."""
    outputs: list[tuple[Tensor, str]] = []  # kept alive, so that identities stay unique
    following: dict[str, str] = {}

    def of_conv(name: str) -> Callable[..., None]:
        return lambda _, __, output: outputs.append((output, name))

    def of_norm(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: Tensor) -> None:
            for output, conv in outputs:
                if output is given:
                    following[conv] = name

        return hook

    def hooks() -> Iterator[RemovableHandle]:
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d | SBFConv2d):
                yield module.register_forward_hook(of_conv(name))
            elif isinstance(module, nn.BatchNorm2d):
                yield on_input(module, of_norm(name))

    with registered(hooks()):
        model(images)
    return following


def movable(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Map each layer to the batch norm behind it, if that has statistics and no other user."""
    following = following_norms(model, images)
    users = list(following.values())
    found: dict[str, str] = {}
    for name, norm in following.items():
        module = model.get_submodule(norm)
        if (
            users.count(norm) == 1
            and isinstance(module, _BatchNorm)
            and module.running_mean is not None
            and module.running_var is not None
        ):
            found[name] = norm
    return found


@dataclass(frozen=True)
class Statistics:
    """Means and variances (C,) of a layer's outputs."""

    mean: Tensor
    variance: Tensor


@torch.no_grad()
def move_mean(norm: _BatchNorm, dense: Statistics, now: Statistics) -> None:
    """Add to the running mean of `norm` what the mean of its inputs has changed by."""
    assert norm.running_mean is not None
    norm.running_mean += (now.mean - dense.mean).to(norm.running_mean)


@torch.no_grad()
def move_variance(norm: _BatchNorm, dense: Statistics, now: Statistics) -> None:
    """Multiply the running variance of `norm` by what that of its inputs has changed by."""
    assert norm.running_var is not None
    least = LEAST * dense.variance.mean() + torch.finfo(torch.double).tiny ** 0.5
    ratio = (now.variance + least) / (dense.variance + least)
    norm.running_var *= ratio.clamp(MOST**-2, MOST**2).to(norm.running_var)


def running_statistics(reference: Reference) -> dict[str, tuple[Tensor, Tensor]]:
    """Map batch norms of `reference` to running mean and variance of the channels left."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, norm in reference.module.named_modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            assert norm.running_var is not None
            mean, variance = norm.running_mean[None], norm.running_var[None]
            found[name] = reference.select(name, mean)[0], reference.select(name, variance)[0]
    return found


@torch.no_grad()
def move_batch_norms(student: nn.Module, reference: Reference, images: Calibration) -> None:
    """Move the statistics of all batch norms of `student`, in place and in forward order.

    Each gets the statistics of `reference` and what its inputs differ by from those there, for what
    the batch norms before it then give: batch by batch, and in the end by the mean of all. What
    fitting has left in them does not count twice so. Of many images the first MOST_IMAGES are
    looked at. `reference` names the channels of a batch norm that are left by its name.
    """
    old = running_statistics(reference)
    norms = {
        name: module
        for name, module in student.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and name in old  # one in an SBF layer is new
    }
    own = {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}
    sums = {name: [torch.zeros_like(t, dtype=torch.double) for t in old[name]] for name in norms}
    given: dict[str, Statistics] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, features: Tensor) -> None:
            given[name] = _of(reference.select(name, features))

        return hook

    def move(name: str) -> Callable[..., None]:
        def hook(norm: _BatchNorm, features: Tensor) -> None:
            mean, variance = old[name]
            norm.running_mean, norm.running_var = mean.clone(), variance.clone()
            now = _of(features)
            move_mean(norm, given[name], now)
            move_variance(norm, given[name], now)
            moved = (norm.running_mean, norm.running_var)
            for total, statistic in zip(sums[name], moved, strict=True):
                total.add_(statistic.double(), alpha=len(features))

        return hook

    dense = reference.module

    def hooks() -> Iterator[RemovableHandle]:
        for name, norm in norms.items():
            yield on_input(dense.get_submodule(name), look(name))
            yield on_input(norm, move(name))

    count = 0
    with registered(hooks()):
        for batch in images.parts(images.part, MOST_IMAGES):
            dense(batch)
            student(batch)
            count += len(batch)
    for name, norm in norms.items():
        # The tensors that there were: others may hold them.
        norm.running_mean, norm.running_var = own[name]
        for statistic, total in zip(own[name], sums[name], strict=True):
            assert statistic is not None
            statistic.copy_(total / count)


def _of(features: Tensor) -> Statistics:
    """Means and variances over images and positions of (N, C, …)."""
    axes = (0, *range(2, features.ndim))
    # In the images' precision: it is exact to rounding, and a copy in double takes four times as
    # long as the rest.
    variance, mean = torch.var_mean(features, axes, correction=0)
    return Statistics(mean.double(), variance.double())
