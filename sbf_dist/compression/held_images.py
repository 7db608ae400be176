"""Images that a calibration has read, to be given in another order."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sbf_dist.compression.fitting.shelf import Shelf

MEMORY = 2**28  # bytes of images that were read; more of them lie in a temporary file


class HeldImages:
    """All images in an `order` of their numbers, in batches of `size`, any number of times.

    given: the images' batches; what lies in memory already is not copied. read: gives them checked,
    once; each image is then kept. images_of: the images (N, …) of a batch.
    """

    def __init__(
        self,
        given: Iterable[Any],
        read: Callable[[], Iterable[Tensor]],
        images_of: Callable[[Any], Tensor],
        order: Sequence[int],
        size: int,
    ) -> None:
        self._order = order
        self._size = size
        self._image: Callable[[int], Tensor]
        if isinstance(given, list | tuple):
            batches = [images_of(batch) for batch in given]
            places = [(batch, row) for batch in batches for row in range(len(batch))]
            self._image = lambda number: places[number][0][places[number][1]]
            return
        shelf = Shelf(MEMORY)
        kept = [shelf.keep({"image": image.clone()}) for batch in read() for image in batch]
        self._image = lambda number: shelf.get(kept[number])["image"]

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self._order), self._size):
            images = [self._image(number) for number in self._order[start : start + self._size]]
            yield torch.stack(images).contiguous(memory_format=_layout_of(images[0]))


def _layout_of(image: Tensor) -> torch.memory_format:
    """Return the layout of the batch that an image comes from."""
    if image.ndim != 3 or image.is_contiguous():
        return torch.contiguous_format
    last = image[None].is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
