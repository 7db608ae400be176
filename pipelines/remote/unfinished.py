"""A shard that is on its way to a machine's cache: the bytes that have come, and which they are."""

import errno
import fcntl
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DATA, BLOCKS = ".partial", ".blocks"  # suffixes of the two files
BLOCK_BYTES = 512  # of a tar file: every member begins with one
JOINED_BYTES = 16 << 10  # a request costs as much time; gaps that lie nearer are one


@dataclass(frozen=True)
class Unfinished:
    """Two files, written and read by all processes of the machine at once.

    place  of the shard once it is whole; the files have its name with a suffix
    size   of the shard, bytes

    One file has the shard's size. The other has a byte for each block: 1 once the block is in the
    first. A block is marked after it was written; it may be written twice, with the same content.
    Whoever reads compares digests: after a loss of power, a mark may be there without its block.
    """

    place: Path
    size: int

    @property
    def data(self) -> Path:
        return self.place.with_name(self.place.name + DATA)

    @property
    def blocks(self) -> Path:
        return self.place.with_name(self.place.name + BLOCKS)

    def exists(self) -> bool:
        """Whether both files are there, of the right sizes."""
        return _size(self.data) == self.size and _size(self.blocks) == self._count

    def create(self) -> None:
        """Make both files, and take their room on the disk; OSError leaves nothing."""
        try:
            for path, size in ((self.blocks, self._count), (self.data, self.size)):
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                try:
                    os.ftruncate(handle, 0)
                    _reserve(handle, size)
                finally:
                    os.close(handle)
        except OSError:
            self.remove()
            raise

    def remove(self) -> None:
        for path in (self.data, self.blocks):
            path.unlink(missing_ok=True)

    def claim(self) -> int | None:
        """Return a descriptor that makes the caller the one that finishes it, until it is closed.

        None while another one is at it.
        """
        handle = os.open(self.blocks, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return handle

    def read(self, offset: int, count: int) -> bytes | None:
        """Return a part, None if it is not all here."""
        first, end = offset // BLOCK_BYTES, -(-(offset + count) // BLOCK_BYTES)
        marks = _read(self.blocks, first, end - first)
        if marks is None or len(marks) < end - first or 0 in marks:
            return None
        return _read(self.data, offset, count)

    def write(self, offset: int, data: bytes) -> None:
        """Keep a part; nothing happens if the shard is whole or removed by now."""
        end = offset + len(data)
        first = -(-offset // BLOCK_BYTES)
        last = self._count if end == self.size else end // BLOCK_BYTES
        for path, at, content in (
            (self.data, offset, data),
            (self.blocks, first, b"\1" * (last - first)),
        ):
            try:
                handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return
            try:
                _write(handle, content, at)
            finally:
                os.close(handle)

    def gap(self, most: int) -> tuple[int, int] | None:
        """Return offset and length of the first part that is not here, None if all is.

        At most so many bytes. Gaps that are less than JOINED_BYTES apart are returned as one.
        """
        missing = np.flatnonzero(self._marks() == 0)
        if not len(missing):
            return None
        apart = np.diff(missing) > JOINED_BYTES // BLOCK_BYTES
        last = missing[int(np.argmax(apart))] if apart.any() else missing[-1]
        start = int(missing[0]) * BLOCK_BYTES
        end = min((int(last) + 1) * BLOCK_BYTES, self.size, start + most)
        return start, end - start

    def digest(self) -> str:
        """Return the SHA-256 of all bytes, once they are on the disk."""
        with self.data.open("rb") as file:
            os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def _count(self) -> int:
        return -(-self.size // BLOCK_BYTES)

    def _marks(self) -> NDArray[np.uint8]:
        return np.fromfile(self.blocks, dtype=np.uint8)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _read(path: Path, offset: int, count: int) -> bytes | None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return os.pread(handle, count, offset)
    finally:
        os.close(handle)


def _write(handle: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count


def _reserve(handle: int, size: int) -> None:
    """Take a file's space on the disk, so that others see that it is taken; it reads as zeros."""
    if not size:
        return
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(handle, size)  # of some file systems it cannot be taken
