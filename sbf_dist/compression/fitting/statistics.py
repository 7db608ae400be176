"""Statistics of a network over calibration images: moments, sensitivities, those of batch norm.

Nothing here grows with the number of images: each batch is reduced to Gram matrices at once.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.finite import check_features, check_gradients
from sbf_dist.compression.outputs import LOGITS, Yardstick, run_backward
from sbf_dist.compression.precision import widened
from sbf_dist.hooks import on_output, registered

BLOCK = 1024  # rows of a Gram matrix at a time


class _Reached(Exception):  # noqa: N818  (it is control flow, not an error)
    """Raised by a hook to leave a forward pass at the layer that was looked for."""


def run_until(model: nn.Module, name: str, images: Tensor, *, output: bool) -> Tensor:
    """Run `model` up to the layer `name` and return that layer's output (or else its input)."""
    found: list[Tensor] = []

    def hook(_: nn.Module, given: Tensor, result: Tensor) -> None:
        found.append(result if output else given)
        raise _Reached

    with registered([on_output(model.get_submodule(name), hook)]), suppress(_Reached):
        model(images)
    assert found, f"{name} is not reached by a forward pass"
    return found[0]


def neighbourhoods(features: Tensor, size: int, positions: Tensor | None = None) -> Tensor:
    """Lay out size x size zero-padded neighbourhoods of (N, C, H, W) as rows (n, C·size²).

    `positions` (N, k) are numbers in H·W, of each image its own; None takes all. Rows are in order
    of images and positions. The result is never a view of `features`.
    """
    padded = F.pad(features, [size // 2] * 4)
    return patches(padded, (size, size), positions, (1, 1), (1, 1))


def patches(
    padded: Tensor,
    kernel: tuple[int, int],
    positions: Tensor | None,
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Lay out what a convolution's kernel sees of (N, C, H, W) as rows (n, C·kernel).

    `positions` (N, k) are numbers in the H'·W' of the convolution's output; None takes all.
    """
    count, channels, height, width = padded.shape
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    rows_out = (height - reach[0] - 1) // stride[0] + 1
    columns_out = (width - reach[1] - 1) // stride[1] + 1
    flat = padded.permute(0, 2, 3, 1).reshape(-1, channels)
    if positions is None:
        positions = torch.arange(rows_out * columns_out).expand(count, -1)
    positions = positions.to(padded.device)
    first = positions // columns_out * stride[0] * width + positions % columns_out * stride[1]
    first = (first + torch.arange(count, device=padded.device)[:, None] * height * width).ravel()
    rows = flat.new_empty(len(first), channels, kernel[0] * kernel[1])
    for tap in range(kernel[0] * kernel[1]):
        down, right = tap // kernel[1] * dilation[0], tap % kernel[1] * dilation[1]
        rows[:, :, tap] = flat.index_select(0, first + down * width + right)
    return rows.flatten(1)


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
        return dataclasses.replace(
            self, zz=self.zz[rows[:, None], rows], zy=self.zy[rows], z_mean=self.z_mean[rows]
        )

    def leading(self, channels: int) -> "Moments":
        """Return the moments with only the first `channels` as candidates, sharing memory."""
        rows = channels * self.size**2
        return dataclasses.replace(
            self, zz=self.zz[:rows, :rows], zy=self.zy[:rows], z_mean=self.z_mean[:rows]
        )

    def centre(self, size: int) -> "Moments":
        """Return the moments of the smaller size x size neighbourhoods."""
        if size == self.size:
            return self
        border = (self.size - size) // 2
        taps = torch.arange(self.size**2).view(self.size, self.size)
        inner = taps[border : border + size, border : border + size].ravel()
        candidates = len(self.zz) // self.size**2
        rows = (torch.arange(candidates)[:, None] * self.size**2 + inner).ravel()
        return dataclasses.replace(
            self,
            zz=self.zz[rows[:, None], rows],
            zy=self.zy[rows],
            z_mean=self.z_mean[rows],
            size=size,
        )


class MomentSums:
    """Sums over rows of candidates and targets, from which their Moments follow.

    Holds one (C·m², C·m²) matrix of doubles, however many rows there are; `add` needs half as much
    more at most, beside the rows that it is given.
    """

    def __init__(self, size: int, *, paired: bool = True) -> None:
        self.size = size
        self.paired = paired  # a candidate for each target: the drift is measured
        self.count = 0
        self._sums: list[Tensor] = []
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, columns: Tensor, targets: Tensor) -> None:
        """Add rows of candidates (n, C·m²), which are overwritten later, and of targets (n, C).

        Both are as `neighbourhoods` lays them out, targets without shifts.
        """
        # Writing a wide layer's matrix takes longer than its product of few rows: they wait until
        # they are many.
        self.count += len(columns)
        self._waiting.append((widened(columns), widened(targets).clone()))
        if 2 * sum(len(rows) for rows, _ in self._waiting) >= columns.shape[1]:
            self._sum_up()

    def _sum_up(self) -> None:
        """Add the rows that wait to the sums."""
        columns, targets = map(_in_one, zip(*self._waiting, strict=True))
        self._waiting = []
        width, centre = columns.shape[1], self.size**2 // 2
        if not self._sums:
            # Covariances do not depend on the origin. One near the means keeps the difference of
            # two large numbers, and so the images' precision, out of them.
            self._z_origin, self._y_origin = columns.mean(0), targets.mean(0)
            channels = targets.shape[1]
            shapes = [(width, width), (width, channels), *(3 * [(channels,)]), (width,)]
            self._sums = [columns.new_zeros(shape, dtype=torch.double) for shape in shapes]
        columns -= self._z_origin
        targets -= self._y_origin
        zz, zy, yy, y_sum, drift, z_sum = self._sums
        # Products run in the images' precision, sums over batches in double. The matrix is
        # symmetric: block by block, only what is right of the diagonal.
        for start in range(0, width, BLOCK):
            block = columns[:, start : start + BLOCK].T
            zz[start : start + BLOCK, start:] += block @ columns[:, start:]
            zy[start : start + BLOCK] += block @ targets
        yy += targets.square().sum(0)
        y_sum += targets.sum(0)
        z_sum += columns.sum(0)
        if self.paired:
            drift += (targets - columns[:, centre :: self.size**2]).square().sum(0)

    def moments(self, layer: str | None = None) -> Moments:
        """Return the moments of all rows, and forget the sums.

        Raises UserError, which names the `layer` that they are of, if they are not finite.
        """
        if self._waiting:
            self._sum_up()
        # Small from here on, and full of small solves: the CPU's work.
        zz, zy, yy, y_mean, drift, z_mean = (term.cpu().div_(self.count) for term in self._sums)
        self._sums = []
        check_features(layer, zz.diagonal(), yy, z_mean, y_mean)
        for start in range(0, len(zz), BLOCK):
            end = start + BLOCK
            zz[end:, start:end] = zz[start:end, end:].T
        if self.paired:
            shift = y_mean - z_mean[self.size**2 // 2 :: self.size**2]
            drift = (drift - shift.square()).clamp(min=0)
        return Moments(
            zz=zz.addr_(z_mean, z_mean, alpha=-1),
            zy=zy.addr_(z_mean, y_mean, alpha=-1),
            yy=(yy - y_mean.square()).clamp(min=0),
            z_mean=z_mean + self._z_origin.double().cpu(),
            y_mean=y_mean + self._y_origin.double().cpu(),
            drift=drift,
            size=self.size,
        )


def _in_one(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def gather_moments(batches: Iterable[tuple[Tensor, Tensor]], size: int) -> Moments:
    """Reduce batches of (candidates z, targets y), both (N, C, H, W), to their moments."""
    sums = MomentSums(size)
    for z, y in batches:
        sums.add(neighbourhoods(z, size), neighbourhoods(y, 1))
    return sums.moments()


def output_sensitivity(
    model: nn.Module,
    names: list[str],
    batches: Callable[[], Iterator[Tensor]],
    seed: int,
    yardstick: Yardstick = LOGITS,
) -> dict[str, Tensor]:
    """Estimate how much the loss grows per squared error of each channel of each named layer.

    The diagonal Fisher information of the layer's outputs, summed over positions, with labels
    drawn from the network's own predictions (Martens, arXiv 1412.1193, section 5): a second-order
    estimate of the divergence, by `yardstick`, that a small error in a channel causes. Each result
    is (C,). Raises UserError where gradients are not finite.
    """
    totals: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module], RemovableHandle]:
        # Linear layers may give (N, H, W, C): the number of axes says nothing.
        channels = -1 if isinstance(model.get_submodule(name), nn.Linear) else 1

        def backward(gradient: Tensor) -> None:
            total = gradient.double().square().movedim(channels, 0).flatten(1).sum(1)
            totals[name] = totals[name] + total if name in totals else total

        def hook(_: nn.Module, __: tuple[Tensor, ...], result: Tensor) -> Tensor:
            result.register_hook(backward)
            return result.clone()  # which an activation may overwrite in place

        return lambda layer: layer.register_forward_hook(hook)

    hooks = {name: keep(name) for name in names}
    count = sum(run_backward(model, hooks, batches(), yardstick, seed=seed))
    found = {name: totals[name].cpu() / count for name in names}
    check_gradients(found)
    return found


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
    for part in calibration.parts(batch):
        seen += len(part)
        for norm in norms:
            norm.momentum = len(part) / seen  # the mean of all so far
        model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
