"""WebDataset shards: tar files in which an image and its label stand side by side."""

import hashlib
import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

MAX_SHARD_SAMPLES = 5000
MAX_SHARD_BYTES = 256 * 10**6
_BLOCK_BYTES = 512
_LABEL_BYTES = 2 * _BLOCK_BYTES  # a header and a block for the label


def shuffled_runs(
    sizes: NDArray[np.int64],
    rows: NDArray[np.int64],
    *,
    seed: int,
    most_samples: int = MAX_SHARD_SAMPLES,
    most_bytes: int = MAX_SHARD_BYTES,
) -> list[NDArray[np.int64]]:
    """`rows` in an order that `seed` decides, cut where a shard is full.

    `sizes` are the images' bytes. A shard is filled up to most_samples images or most_bytes of tar
    file, whichever comes first, and holds one image at least.
    """
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(rows)
    taken = (
        2 * _BLOCK_BYTES + _LABEL_BYTES + sizes[order]
    )  # header, image, up to a block of padding, label
    runs, start, filled = [], 0, 0
    for at, size in enumerate(taken.tolist()):
        if at > start and (at - start == most_samples or filled + size > most_bytes):
            runs.append(order[start:at])
            start, filled = at, 0
        filled += size
    if len(order):
        runs.append(order[start:])
    return runs


@dataclass(frozen=True)
class Shard:
    """A shard that was written: its size and digest, where its images begin, and its index."""

    bytes: int
    sha256: str
    offsets: list[int]
    index: str


def write_shard(path: Path, samples: Iterable[tuple[str, int, bytes]]) -> Shard:
    """Write a tar file of (name, label, image): NAME, then the label in NAME's stem + ".cls".

    The bytes depend on the samples alone: no time, no owner. The index is the text that DALI's
    readers.webdataset wants (wds2idx, version 1.2).
    """
    offsets, lines = [], []
    with path.open("wb") as file:
        hashed = _Hashed(file)
        tar = tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[call-overload]  # noqa: SIM115
        for name, label, image in samples:
            stem, _, suffix = name.rpartition(".")
            assert "." not in stem.rpartition("/")[2], f"{name}: WebDataset cuts at the first dot"
            offsets.append(_add(tar, name, image))
            text = str(label).encode()
            at = _add(tar, f"{stem}.cls", text)
            lines.append(
                f"{suffix} {offsets[-1]} {len(image)} {name} cls {at} {len(text)} {stem}.cls"
            )
        tar.close()  # not in case of an error: it would write an end to what has none
    index = "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"
    return Shard(hashed.bytes, hashed.digest.hexdigest(), offsets, index)


class _Hashed:
    """A file that is written from its beginning to its end, and hashed by the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.bytes, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.bytes


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a file; return the offset of its first byte."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    offset = tar.offset + _BLOCK_BYTES
    tar.addfile(info, io.BytesIO(data))
    return offset
