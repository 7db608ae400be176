"""Statistics of a network over calibration images: moments, sensitivities, those of batch norm.

Nothing here grows with the number of images: each batch is reduced to Gram matrices at once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from sbf_dist.compress.calibration import Calibration

POSITIONS = 512  # per image


class _Reached(Exception):  # noqa: N818  (it is control flow, not an error)
    """Raised by a hook to leave a forward pass at the layer that was looked for."""


def run_until(model: nn.Module, name: str, images: Tensor, *, output: bool) -> Tensor:
    """Run `model` up to the layer `name` and return that layer's output (or else its input)."""
    found: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        found.append(result if output else inputs[0])
        raise _Reached

    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        model(images)
    except _Reached:
        pass
    finally:
        handle.remove()
    assert found, f"{name} is not reached by a forward pass"
    return found[0]


def shifted(features: Tensor, size: int) -> Tensor:
    """Lay out the size x size zero-padded neighbourhoods of (N, C, H, W) as (C·size², N·H·W).

    The result is never a view of `features`.
    """
    if size == 1:
        return features.transpose(0, 1).flatten(1).clone(memory_format=torch.contiguous_format)
    columns = F.unfold(features, size, padding=(size - 1) // 2)
    return columns.transpose(0, 1).reshape(columns.shape[1], -1)


@dataclass
class Moments:
    """Centred second moments of basis candidates z (with their shifts) and targets y.

    zz: (C·m², C·m²), zy: (C·m², C), yy: (C,) are covariances; z_mean: (C·m²,), y_mean: (C,);
    drift: (C,) is the mean squared difference between candidate and target of a channel after
    its mean is corrected: what keeping the channel leaves as error. All double, on the CPU.
    """

    zz: Tensor
    zy: Tensor
    yy: Tensor
    z_mean: Tensor
    y_mean: Tensor
    drift: Tensor
    size: int

    def restrict(self, channels: list[int]) -> "Moments":
        """Return the moments with only `channels` as candidates; targets stay."""
        rows = (torch.tensor(channels)[:, None] * self.size**2 + torch.arange(self.size**2)).ravel()
        return Moments(
            zz=self.zz[rows][:, rows],
            zy=self.zy[rows],
            yy=self.yy,
            z_mean=self.z_mean[rows],
            y_mean=self.y_mean,
            drift=self.drift,
            size=self.size,
        )


def gather_moments(batches: Iterator[tuple[Tensor, Tensor]], size: int) -> Moments:
    """Reduce batches of (candidates z, targets y), both (N, C, H, W), to their moments.

    Of each batch no more than POSITIONS positions per image are used, drawn at random: the
    neighbours in a large feature map tell little more than the work that they cost.
    """
    generator = torch.Generator().manual_seed(0)
    count = 0
    centre = size**2 // 2
    sums: list[Tensor] = []
    for z, y in batches:
        columns, targets = shifted(z, size), shifted(y, 1)
        enough = len(z) * POSITIONS
        if targets.shape[1] > enough:
            drawn = torch.randperm(targets.shape[1], generator=generator)[:enough]
            columns, targets = columns[:, drawn], targets[:, drawn]
        if not sums:
            # Covariances do not depend on the origin. One near the means keeps the difference of
            # two large numbers, and so the images' precision, out of them.
            z_origin, y_origin = columns.mean(1, keepdim=True), targets.mean(1, keepdim=True)
        columns -= z_origin
        targets -= y_origin
        difference = targets - columns[centre :: size**2]
        count += targets.shape[1]
        # Products run in the images' precision, sums over batches in double.
        terms = [
            columns @ columns.T,
            columns @ targets.T,
            targets.square().sum(1),
            columns.sum(1),
            targets.sum(1),
            difference.square().sum(1),
        ]
        doubles = [term.double() for term in terms]
        sums = [a + b for a, b in zip(sums, doubles, strict=True)] if sums else doubles
    # Small from here on, and full of small solves: the CPU's work.
    zz, zy, yy, z_mean, y_mean, drift = (term.cpu() / count for term in sums)
    shift = y_mean - z_mean[centre :: size**2]
    return Moments(
        zz=zz - torch.outer(z_mean, z_mean),
        zy=zy - torch.outer(z_mean, y_mean),
        yy=(yy - y_mean.square()).clamp(min=0),
        z_mean=z_mean + z_origin[:, 0].double().cpu(),
        y_mean=y_mean + y_origin[:, 0].double().cpu(),
        drift=(drift - shift.square()).clamp(min=0),
        size=size,
    )


def output_sensitivity(
    model: nn.Module, names: list[str], batches: Callable[[], Iterator[Tensor]], seed: int
) -> dict[str, Tensor]:
    """Estimate how much the loss grows per squared error of each channel of each named layer.

    The diagonal Fisher information of the layer's outputs, summed over positions, with labels
    drawn from the network's own predictions (Martens, arXiv 1412.1193, section 5): a second-order
    estimate of the KL divergence that a small error in a channel causes. Each result is (C,).
    """
    generator = torch.Generator().manual_seed(seed)
    totals: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], result: Tensor) -> Tensor:
            outputs[name] = result
            return result.clone()  # which an activation may overwrite in place

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    count = 0
    try:
        for images in batches():
            with torch.enable_grad():
                logits = model(images.detach().requires_grad_())
                drawn = torch.multinomial(logits.softmax(1).cpu(), 1, generator=generator)
                loss = F.cross_entropy(logits, drawn[:, 0].to(logits.device), reduction="sum")
                gradients = torch.autograd.grad(loss, [outputs[name] for name in names])
            count += len(images)
            for name, gradient in zip(names, gradients, strict=True):
                total = gradient.double().square().sum((0, 2, 3))
                totals[name] = totals[name] + total if name in totals else total
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.cpu() / count for name, total in totals.items()}


@torch.no_grad()
def measure_batch_norm(model: nn.Module, images: Tensor | Calibration, batch: int) -> None:
    """Measure the running statistics of all batch norms anew, and leave `model` in eval mode.

    Only batch norms run in training mode, so that dropout does not disturb what is measured;
    `images` (N, C, H, W) go through in parts of at most `batch`, which count by their size.
    """
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    calibration = Calibration.of(images)
    seen = 0
    for part in calibration.parts(
        math.ceil(calibration.count / math.ceil(calibration.count / batch))
    ):
        seen += len(part)
        for norm in norms:
            norm.momentum = len(part) / seen  # the mean of all so far
        model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
