"""Calibration images as a stream that is read repeatedly."""

import copy
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.compression.held_images import HeldImages
from sbf_dist.compression.inputs import Packing
from sbf_dist.errors import UserError

BATCH = 64  # images at a time, where it is ours to choose
PIXELS = 2**19  # of a batch for the layers' statistics: 10 images of 224 px, 64 of 90 px

GRID = 4  # pixels of each axis by which images are recognised
CELLS = 8  # of each axis, by whose means they are recognised as well: pixels lie between others
TOLERANCE = 0.02  # of normalised values, which are about 1

Batches = Iterable[Any]  # of tensors (N, C, H, W), or of sequences that begin with one


class Calibration:
    """Normalised images (N, C, H, W) that can be iterated any number of times.

    batches: an object whose iter() starts anew, as a list or a DataLoader, of tensors or of
    (image, label). Each iteration gives the same batches in the same order, on `device`, in `dtype`
    (their own, if that is None). Only the batch at hand is held, so memory does not grow with the
    number of images. `count` is that number, `shape` is that of an image, (C, H, W). With a
    `packing`, batches are tuples of the inputs of a network that takes several, or come packed;
    they are given packed, (N, L), `shape` is (L,), and `image_shape` is that of the first input, an
    image. `sources` says of each image
    which file or folder it comes from: what is held out to judge by comes from other sources than
    what is fitted to (`holding_out`). Raises UserError if there are no images, if they differ in
    shape, if an iteration gives others than the first, or in another order, or if `sources` are not
    as many.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        sources: Sequence[Hashable] | None = None,
        packing: Packing | None = None,
    ) -> None:
        if isinstance(batches, Iterator):
            raise UserError(
                f"calibration images: a {type(batches).__name__} can be iterated only once; give "
                "an object that can be iterated again, such as a list or a DataLoader"
            )
        self._batches = batches
        self.device = torch.device(device)
        self.dtype = dtype
        self._layout = torch.preserve_format
        self.packing = packing
        self.is_spread = False  # whether the first images, however many, are of all places
        self.shape: tuple[int, ...] = ()
        self.count = 0
        samples: list[Tensor] = []
        for batch in batches:
            images = self._images_of(batch)
            if self.count == 0:
                self.shape = tuple(images.shape[1:])
            self._check_shape(images)
            self.count += len(images)
            samples.append(_samples(images))
        if self.count == 0:
            raise UserError("calibration images: no image is given")
        self._samples = torch.cat(samples)
        if sources is not None and len(sources) != self.count:
            raise UserError(
                f"calibration images: {len(sources)} sources are named for {self.count} images"
            )
        self.sources = None if sources is None else list(sources)

    @classmethod
    def of(
        cls,
        images: "Images",
        *,
        batch: int = BATCH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        sources: Sequence[Hashable] | None = None,
        packing: Packing | None = None,
    ) -> "Calibration":
        """Make a Calibration of a tensor (N, C, H, W), of a re-iterable of batches, or of another.

        `batch` is the number of images at a time where a tensor is given; `device` is where the
        batches come, if not where they are given (of an iterable: the CPU), `dtype` their
        floating-point type. `sources` and `packing` are of a tensor's or an iterable's images.
        """
        if isinstance(images, Calibration):
            return images.to(device, dtype)
        if isinstance(images, Tensor):
            where = images.device if device is None else device
            given: Batches = _evenly(images, batch)
        else:
            given, where = images, torch.device("cpu" if device is None else device)
        return cls(given, device=where, dtype=dtype, sources=sources, packing=packing)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Calibration":
        """Return the same images, coming on another device, in another floating-point type."""
        if device is None and dtype is None:
            return self
        other = copy.copy(self)
        other.device = self.device if device is None else torch.device(device)
        other.dtype = self.dtype if dtype is None else dtype
        return other

    def contiguous(self) -> "Calibration":
        """Return the same images, coming contiguous, however they lie in memory now."""
        return self._laid_out(torch.contiguous_format)

    def channels_last(self) -> "Calibration":
        """Return the same images, coming in channels_last."""
        return self._laid_out(torch.channels_last)

    def laid_out_as(self, other: "Calibration") -> "Calibration":
        """Return the same images, coming in the layout of another's."""
        return self._laid_out(other._layout)

    def _laid_out(self, layout: torch.memory_format) -> "Calibration":
        other = copy.copy(self)
        other._layout = layout
        return other

    def __iter__(self) -> Iterator[Tensor]:
        for images in self._checked():
            yield self._ready(images)

    def parts(self, most: int, first: int | None = None) -> Iterator[Tensor]:
        """Give the images in parts of about equal size, of at most `most`, or three.

        Sizes differ by at most one, and no part has a single image unless there is but one: batch
        norm in training mode cannot take one. With `first`, no more parts are given than the first
        `first` images are in, whole ones.
        """
        wanted = None if first is None else min(first, self.count)
        held: list[Tensor] = []  # what has come of the next part
        given, sizes = 0, iter(self.part_sizes(most))
        missing = next(sizes)
        for batch in self._checked():
            images = batch
            while missing and len(images) >= missing:
                piece, images = images[:missing], images[missing:]
                given += missing + sum(map(len, held))
                yield self._ready(torch.cat([*held, piece]) if held else piece)
                if wanted is not None and given >= wanted:
                    return
                held, missing = [], next(sizes, 0)
            if len(images):
                # It may be a view of a buffer that its loader writes to again.
                held.append(images.clone())
                missing -= len(images)

    def part_sizes(self, most: int) -> list[int]:
        """Return how many images each part of `parts` has."""
        number = max(1, min(-(-self.count // most), self.count // 2))
        ends = [self.count * (index + 1) // number for index in range(number)]
        return [end - start for start, end in pairwise([0, *ends])]

    def first(self, count: int) -> Tensor:
        """Return a copy of the first `count` images, or of all if there are fewer."""
        pieces = []
        for images in self._checked():
            # The batches may be views of buffers that their loader writes to again.
            pieces.append(self._ready(images[:count]).clone())
            count -= len(images)
            if count <= 0:
                break
        return torch.cat(pieces)

    def in_order(self, order: Sequence[int], sources: Sequence[Hashable]) -> "Calibration":
        """Return all images, with `sources`, in an order of their numbers.

        Those that are not in memory as tensors are read once more, and kept (`HeldImages`).
        """
        other = copy.copy(self)
        other._batches = HeldImages(self._batches, self._checked, self._images_of, order, BATCH)
        other._samples = self._samples[list(order)]
        other.sources = [sources[number] for number in order]
        return other

    @property
    def batches(self) -> Batches:
        """What is iterated: batches as they were given, with what stands behind the images."""
        return self._batches

    @property
    def part(self) -> int:
        """Images in a batch whose features are held for statistics: fewer where they are large."""
        _, height, width = self.image_shape
        return max(2, min(BATCH, PIXELS // (height * width)))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image, the first input."""
        channels, height, width = self.shape if self.packing is None else self.packing.shapes[0]
        return channels, height, width

    def _images_of(self, batch: Any) -> Tensor:
        """Return the images of a batch, which may have labels behind them; or its inputs packed."""
        if self.packing is None:
            images = batch[0] if isinstance(batch, list | tuple) and batch else batch
            check_images(images)
            return images
        if isinstance(batch, Tensor) and batch.shape[1:] == (sum(self.packing.sizes),):
            return batch
        return self.packing.pack(batch, self.dtype)

    def _ready(self, images: Tensor) -> Tensor:
        dtype = self.dtype if images.is_floating_point() else None
        return images.to(self.device, dtype, memory_format=self._layout)

    def _checked(self) -> Iterator[Tensor]:
        """Give the batches as they come, as long as they are the images of the first pass."""
        seen = 0
        for batch in self._batches:
            images = self._images_of(batch)
            self._check_shape(images)
            self._check_same(images, seen)
            seen += len(images)
            yield images
        if seen != self.count:
            raise UserError(
                f"calibration images: {self.count} came at first, {seen} now; each iteration must "
                "give the same ones"
            )

    def _check_shape(self, images: Tensor) -> None:
        if images.shape[1:] != self.shape:
            raise UserError(
                f"calibration images: a batch of {tuple(images.shape)} came where the first images "
                f"are {self.shape}"
            )

    def _check_same(self, images: Tensor, start: int) -> None:
        """Raise UserError unless `images`, of which `start` came before, are as they were."""
        before = self._samples[start : start + len(images)]
        now = _samples(images)[: len(before)]
        alike = _are_alike(now, before)
        if alike.all():
            return
        first = int(alike.logical_not().nonzero()[0])
        if _are_alike(now[first], self._samples).any():
            raise UserError(
                "calibration images: the images came in another order; give shuffle=False"
            )
        raise UserError(
            f"calibration images: image {start + first} is not the same in each iteration; "
            "leave out random augmentation"
        )


Images = Tensor | Calibration | Batches


def _evenly(images: Tensor, most: int) -> Sequence[Tensor]:
    """Cut a tensor into batches of about equal size, of at most `most` images."""
    return images.tensor_split(-(-len(images) // most)) if len(images) else ()


def _samples(images: Tensor) -> Tensor:
    """Copy the values of pixels on a grid, and means of cells that cover all, a row for each image.

    Enough to recognise it by. Of packed inputs (N, L), values and means of as many places.
    """
    given = images.detach()
    if given.ndim == 2:
        places = torch.linspace(0, given.shape[1] - 1, 3 * GRID**2).long()
        grid = given[:, places.to(given.device)].float()
        means = F.adaptive_avg_pool1d(given.float()[:, None], min(given.shape[1], 3 * CELLS**2))
    else:
        rows, columns = (torch.linspace(0, size - 1, GRID).long() for size in given.shape[2:])
        grid = given[:, :, rows.to(given.device)][..., columns.to(given.device)].float()
        height, width = given.shape[2:]
        means = F.adaptive_avg_pool2d(given.float(), (min(CELLS, height), min(CELLS, width)))
    return torch.cat([grid.flatten(1), means.flatten(1)], 1).cpu()


def _are_alike(samples: Tensor, others: Tensor) -> Tensor:
    """Compare rows of samples, up to what decoding the same file twice may differ by."""
    return torch.isclose(samples, others, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True).all(-1)


def check_images(images: Any) -> None:
    """Raise UserError unless `images` are a tensor (N, C, H, W)."""
    if not isinstance(images, Tensor) or images.ndim != 4:
        kind = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise UserError(f"calibration images: a batch is {kind}, it must be a tensor (N, C, H, W)")


def device_of(model: nn.Module) -> torch.device:
    """Return where the parameters of `model` are."""
    return next(model.parameters()).device


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the floating-point type of the first parameters of `model`."""
    floating = (x.dtype for x in model.parameters() if x.is_floating_point())
    return next(floating, torch.get_default_dtype())
