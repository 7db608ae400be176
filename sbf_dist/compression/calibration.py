"""Calibration images as a stream: read repeatedly, never held as a whole."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sbf_dist.errors import UserError

BATCH = 64  # images at a time, where it is ours to choose
SAMPLED = 1024  # values of an image that it is recognised by
TOLERANCE = 0.02  # of normalised values, which are about 1
PIXELS = 2**19  # of a batch for the layers' statistics: 10 images of 224 px, 64 of 90 px


Batches = Iterable[Any]  # of tensors (N, C, H, W), or of sequences that begin with one


class Calibration:
    """Normalised images (N, C, H, W) that can be iterated any number of times.

    batches: an object whose iter() starts anew, as a list or a DataLoader, of tensors or of
    (image, label). Each iteration gives the same batches in the same order, on `device`. Only the
    batch at hand is held, so memory does not grow with the number of images. `count` is that
    number, `shape` is (C, H, W). Raises UserError if there are no images, if they differ in shape,
    or if an iteration gives others, or another number of them, than the first.
    """

    def __init__(self, batches: Batches, *, device: torch.device | str = "cpu") -> None:
        if isinstance(batches, Iterator):
            raise UserError(
                f"calibration images: a {type(batches).__name__} can be iterated only once; "
                "give an object whose iter() starts again, such as a list or a DataLoader"
            )
        self._batches = batches
        self._samples: list[Tensor] = []  # of each batch, to recognise it
        self.device = torch.device(device)
        self.count = 0
        for batch in batches:
            images = _images_of(batch)
            if self.count == 0:
                self.shape = _shape(images)
            self._check_shape(images)
            self._samples.append(_sample(images))
            self.count += len(images)
        if self.count == 0:
            raise UserError("calibration images: no image is given")

    @classmethod
    def of(
        cls,
        images: "Images",
        *,
        batch: int = BATCH,
        device: torch.device | str | None = None,
    ) -> "Calibration":
        """Make a Calibration of a tensor (N, C, H, W), of a re-iterable of batches, or of another.

        `batch` is the number of images at a time where a tensor is given; `device` is where the
        batches come, if not where they are given (of an iterable: the CPU).
        """
        if isinstance(images, Calibration):
            return images if device is None else images.to(device)
        if isinstance(images, Tensor):
            where = images.device if device is None else device
            return cls(images.split(batch) if len(images) else (), device=where)
        return cls(images, device="cpu" if device is None else device)

    def to(self, device: torch.device | str) -> "Calibration":
        """Return the same images, coming on another device."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.device = torch.device(device)
        return other

    def __iter__(self) -> Iterator[Tensor]:
        seen = 0
        for images in self._again():
            seen += len(images)
            yield images.to(self.device)
        if seen != self.count:
            raise UserError(
                f"calibration images: {self.count} came at first, {seen} now; each iteration must "
                "give the same ones"
            )

    def parts(self, most: int, first: int | None = None) -> Iterator[Tensor]:
        """Give the images, or the `first` ones, in batches of at most `most`."""
        left = self.count if first is None else first
        for images in self._again():
            for part in images[:left].split(most):
                yield part.to(self.device)
            left -= len(images)
            if left <= 0:
                return

    def first(self, count: int) -> Tensor:
        """Return a copy of the first `count` images, or of all if there are fewer."""
        # The batches may be views of buffers that their loader writes to again.
        return torch.cat([part.clone() for part in self.parts(count, count)])

    @property
    def part(self) -> int:
        """Images in a batch whose features are held for statistics: less of larger images."""
        _, height, width = self.shape
        return max(1, min(BATCH, PIXELS // (height * width)))

    def _again(self) -> Iterator[Tensor]:
        """Iterate over the batches again."""
        for number, batch in enumerate(self._batches):
            images = _images_of(batch)
            self._check_shape(images)
            if number < len(self._samples) and not _is_alike(
                _sample(images), self._samples[number]
            ):
                raise UserError(
                    f"calibration images: batch {number} holds other images than at first; each "
                    "iteration must give the same in the same order: a loader that neither "
                    "shuffles nor augments"
                )
            yield images

    def _check_shape(self, images: Tensor) -> None:
        if _shape(images) != self.shape:
            raise UserError(
                f"calibration images: a batch of {tuple(images.shape)} came where the first images "
                f"are {self.shape}"
            )


Images = Tensor | Calibration | Batches


def _images_of(batch: Any) -> Tensor:
    """Return the images of a batch, which may have labels behind them."""
    images = batch[0] if isinstance(batch, list | tuple) and batch else batch
    _shape(images)
    return images


def _sample(images: Tensor) -> Tensor:
    """Copy some values of the first image: enough to recognise a batch by."""
    values = images[:1].detach().flatten()
    step = max(1, len(values) // SAMPLED)
    return values[::step].float().cpu().clone()


def _is_alike(sample: Tensor, other: Tensor) -> bool:
    """Compare samples, up to what decoding the same file twice may differ by."""
    return torch.allclose(sample, other, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def _shape(images: Any) -> tuple[int, int, int]:
    if not isinstance(images, Tensor) or images.ndim != 4:
        kind = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise UserError(f"calibration images: a batch is {kind}, it must be a tensor (N, C, H, W)")
    return (images.shape[1], images.shape[2], images.shape[3])


def device_of(model: nn.Module) -> torch.device:
    """Return where the parameters of `model` are."""
    return next(model.parameters()).device
