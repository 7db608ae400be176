"""Small data sets in memory: every image is decoded once."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.flight import Flight
from pipelines.graphs import Form, decode_graph
from pipelines.index import DataIndex
from pipelines.reader import Reader
from pipelines.samples import Pixels
from pipelines.stored import stored_samples
from sbf_dist.errors import UserError
from sbf_dist.settings import View

_BATCH_SIZE = 128
_PREFETCH = 2
_MAX_MEMORY_SHARE = 0.5  # of the memory that is free
_UNUSED_VIEW = View(image_size=1, mean=(0, 0, 0), std=(1, 1, 1))  # decoding alone asks for no view


def decode_all(index: DataIndex, ids: NDArray[np.int64], reader: Reader) -> Pixels:
    """Decode the samples `ids` (ascending) on the CPU, in the reader's threads; keep their pixels.

    UserError where they would fill more than half of the free memory, or where an image has
    vanished, is damaged, or has another size than when it was indexed.
    """
    sizes = index.sizes[ids]
    needed, free = Pixels.bytes_for(sizes), free_memory()
    if needed > _MAX_MEMORY_SHARE * free:
        raise UserError(
            f"cache memory: {len(ids)} decoded images of {index.root} take {needed / 1e9:.1f} GB "
            f"in every worker, {free / 1e9:.1f} GB are free here; use cache: none"
        )
    pixels = Pixels(ids, sizes)
    batches = [ids[start : start + _BATCH_SIZE] for start in range(0, len(ids), _BATCH_SIZE)]
    samples = stored_samples(index, ids, batches, reader.shard_cache)
    depth = min(_PREFETCH, len(batches))
    on_cpu = Reader(threads=reader.threads, prefetch=depth)
    form = Form.of(_UNUSED_VIEW, on_cpu, batch_size=_BATCH_SIZE, source=samples.source)
    flight = Flight(decode_graph(form), samples, on_cpu)
    for batch in batches[:depth]:
        flight.submit(batch, {})
    for number in range(len(batches)):
        taken, images = flight.take_apart()
        if number + depth < len(batches):
            flight.submit(batches[number + depth], {})
        for sample, image in zip(taken, images, strict=True):
            height, width = index.sizes[sample]
            if image.shape[:2] != (height, width):
                raise UserError(
                    f"image {index.place(sample)}: is {image.shape[0]} x {image.shape[1]} pixels, "
                    f"was {height} x {width} when it was indexed; index the images again"
                )
            pixels.put(sample, image)
    return pixels


def free_memory() -> int:
    """Bytes that this machine can still give without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("/proc/meminfo has no MemAvailable")
