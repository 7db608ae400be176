"""Training a compressed network for a moment, to see what training will make of it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.compression.calibration import BATCH, Calibration
from sbf_dist.compression.fitting.statistics import measure_batch_norm
from sbf_dist.compression.outputs import LOGITS, Yardstick
from sbf_dist.hooks import registered
from sbf_dist.strided_convolutions import keep_inputs_contiguous
from sbf_dist.surgery import deep_copy


@dataclass(frozen=True)
class Probe:
    """How each candidate is trained for a moment, by distillation from the dense network.

    SGD with Nesterov momentum 0.9 and a cosine schedule from `rate`, on random shifts of the
    calibration images by up to an eighth of their size, mirrored at random if `flip`. No steps:
    candidates are compared as they were fitted.
    """

    steps: int = 0
    rate: float = 0.02
    batch: int = 64
    temperature: float = 2.0
    flip: bool = False


def train_briefly(
    dense: nn.Module,
    student: nn.Module,
    images: Calibration,
    probe: Probe,
    seed: int,
    yardstick: Yardstick = LOGITS,
) -> nn.Module:
    """Return a copy of `student` that was trained as `probe` says, in evaluation mode."""
    trained = deep_copy(student)
    trained.train()
    for parameter in trained.parameters():
        parameter.requires_grad_()
    optimizer = torch.optim.SGD(
        trained.parameters(), lr=probe.rate, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, probe.steps)
    with registered(keep_inputs_contiguous(trained)), torch.enable_grad():
        for _, x in zip(range(probe.steps), _augmented(images, probe, seed), strict=False):
            with torch.no_grad():
                wanted = dense(x)
            loss = yardstick.distillation(trained(x), wanted, probe.temperature)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    measure_batch_norm(trained, images, BATCH)
    return trained


def _augmented(images: Calibration, probe: Probe, seed: int) -> Iterator[Tensor]:
    """Shifted batches without end: of what the calibration gives, each time in another order."""
    generator = torch.Generator().manual_seed(seed)
    _, height, width = images.image_shape
    reach = (height // 8, width // 8)
    padding = (reach[1], reach[1], reach[0], reach[0])
    while True:
        for batch in _shuffled(images, probe.batch, generator):
            if images.packing is not None:  # what belongs together would not be moved alike
                yield batch
                continue
            padded = F.pad(batch, padding, mode="reflect")
            shifts = [
                torch.randint(0, 2 * r + 1, (len(batch),), generator=generator).tolist()
                for r in reach
            ]
            crops = [
                image[:, top : top + height, left : left + width]
                for image, top, left in zip(padded, *shifts, strict=True)
            ]
            if probe.flip:
                turned = torch.rand(len(crops), generator=generator) < 0.5
                crops = [c.flip(-1) if t else c for c, t in zip(crops, turned, strict=True)]
            yield torch.stack(crops)


def _shuffled(images: Calibration, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of exactly `batch` images in random order, drawn from a window of sixteen batches.

    Fewer than `batch` images are one batch.
    """
    window: list[Tensor] = []
    size = min(batch, images.count)

    def drain(least: int) -> Iterator[Tensor]:
        nonlocal window
        held = torch.cat(window)
        order = torch.randperm(len(held), generator=generator).to(held.device)
        while len(order) >= max(least, size):
            yield held[order[:size]]
            order = order[size:]
        window = [held[order]]

    for part in images:
        window.append(part)
        if sum(map(len, window)) >= 16 * size:
            yield from drain(8 * size)
    yield from drain(size)
