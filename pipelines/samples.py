"""Where a pipeline reads its images: files by name, members of shards, pixels in memory."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.index import NO_SHARD, DataIndex
from pipelines.inspection import inspect_bytes, inspect_image
from sbf_dist.errors import UserError

_MAX_OPEN_SHARDS = 128  # per process; the system's limit is often 1,024 for all files


class Samples(Protocol):
    """What feeds the input `source` of a graph (graphs.Form)."""

    source: str

    def take(self, ids: NDArray[np.int64]) -> Any:
        """The input for these samples, one array each."""

    def explain(self, sample: int) -> str | None:
        """The fault of a sample, as one line that names it; None if it has no fault."""


class Files:
    """Images in files of their own: DALI gets their names and reads them."""

    source = "path"

    def __init__(self, index: DataIndex) -> None:
        self._index, self._root = index, str(index.root)

    def take(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        # Plain strings: pathlib's joins cost a quarter of the time of a batch of small images.
        names = (f"{self._root}/{name}".encode() for name in self._index.take_files(ids))
        return [np.frombuffer(name, dtype=np.uint8) for name in names]

    def read(self, sample: int) -> bytes:
        """The bytes of one file; UserError if it was removed."""
        try:
            return self._path(sample).read_bytes()
        except OSError as error:
            raise UserError(self.explain(sample) or f"image: {error}") from error

    def explain(self, sample: int) -> str | None:
        path = self._path(sample)
        if not path.is_file():
            return (
                f"image {path}: was removed after it was indexed; restore it or index the "
                "images again"
            )
        fault = inspect_image(path).fault
        return None if fault is None else f"image {path}: changed since it was indexed: {fault}"

    def _path(self, sample: int) -> Path:
        return Path(self._root, self._index.files[sample])


class Shards:
    """Images in tar files: their bytes are read by place and length, no member is searched for.

    Samples of the shard −1 are files of their own beside them. A whole batch is announced to
    the kernel first, so that a disk seeks for all of it at once. UserError in take for a shard that
    is missing or too short.
    """

    source = "encoded"

    def __init__(self, index: DataIndex) -> None:
        self._index, self._files = index, Files(index)
        self._open: OrderedDict[int, int] = OrderedDict()

    def take(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        for sample in ids:
            shard, offset, size = self._place(sample)
            if shard != NO_SHARD:
                os.posix_fadvise(self._handle(shard), offset, size, os.POSIX_FADV_WILLNEED)
        return [np.frombuffer(self._read(sample), dtype=np.uint8) for sample in ids]

    def explain(self, sample: int) -> str | None:
        if self._place(sample)[0] == NO_SHARD:
            return self._files.explain(sample)
        fault = inspect_bytes(self._read(sample)).fault
        where = self._index.place(sample)
        return None if fault is None else f"image {where}: changed since it was indexed: {fault}"

    def _place(self, sample: int) -> tuple[int, int, int]:
        index = self._index
        assert index.shard is not None and index.offset is not None
        return int(index.shard[sample]), int(index.offset[sample]), int(index.file_bytes[sample])

    def _read(self, sample: int) -> bytes:
        shard, offset, size = self._place(sample)
        if shard == NO_SHARD:
            return self._files.read(sample)
        data = os.pread(self._handle(shard), size, offset)
        if len(data) < size:
            raise UserError(
                f"image {self._index.place(sample)}: the shard ends before it, so it changed since "
                "it was indexed; restore it or index the images again"
            )
        return data

    def _handle(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        handle = self._opened(shard)
        self._open[shard] = handle
        if len(self._open) > _MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        return handle

    def _opened(self, shard: int) -> int:
        """Return a new descriptor of a shard."""
        path = f"{self._index.root}/{self._index.shards[shard]}"
        try:
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"shard {path}: cannot be opened ({error.strerror}); restore it or index the "
                "images again"
            ) from error

    def __del__(self) -> None:
        for handle in self._open.values():
            os.close(handle)


class Pixels:
    """Decoded images in memory, of one size or of many.

    ids       int64 (n,), ascending
    sizes     int64 (n, 2): height and width
    """

    source = "pixels"

    def __init__(self, ids: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
        self._ids, self._sizes = ids, sizes
        self._starts = np.concatenate([[0], np.cumsum(3 * sizes.prod(axis=1))])
        self._levels = np.empty(self._starts[-1], dtype=np.uint8)
        self._square = len(ids) > 0 and bool((sizes == sizes[0]).all())

    @staticmethod
    def bytes_for(sizes: NDArray[np.int64]) -> int:
        return int(3 * sizes.prod(axis=1).sum())

    def put(self, sample: int, image: NDArray[np.uint8]) -> None:
        """Keep one image, uint8 (h, w, 3); its size must be the one announced."""
        row = int(np.searchsorted(self._ids, sample))
        assert image.shape == (*self._sizes[row], 3)
        self._levels[self._starts[row] : self._starts[row + 1]] = image.reshape(-1)

    def take(self, ids: NDArray[np.int64]) -> "NDArray[np.uint8] | list[NDArray[np.uint8]]":
        rows = np.searchsorted(self._ids, ids)
        if self._square:  # one array: DALI takes it in one copy
            height, width = self._sizes[0]
            return self._levels.reshape(-1, height, width, 3)[rows]
        return [
            self._levels[self._starts[row] : self._starts[row + 1]].reshape(*self._sizes[row], 3)
            for row in rows
        ]

    def explain(self, sample: int) -> str | None:
        return None
