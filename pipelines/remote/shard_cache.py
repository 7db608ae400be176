"""A folder on a machine's own disk that keeps shards of object stores for all its processes."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from io import TextIOWrapper
from pathlib import Path

from sbf_dist.errors import UserError
from sbf_dist.files import cache_folder

CHUNK_BYTES = 8 << 20  # of a request
FREE_SHARE = 1 / 20  # of the disk that stays free where no size is given
_PARTIAL = ".partial"
_GB = 10**9
_number = itertools.count()


class OtherContentError(Exception):
    """What came has another digest than what was asked for."""


class Outcome(Enum):
    """What came of fetching a shard: it is here; another process is at it; there is no room."""

    HERE = auto()
    ELSEWHERE = auto()
    NO_ROOM = auto()


@dataclass(frozen=True)
class ShardCache:
    """Shards by their SHA-256, in files that are there as a whole or not at all.

    folder     on a disk of this machine: locks are flock's, which go with their process
    gigabytes  of 10^9 bytes, that all shards may take; None: all but a twentieth of the disk

    Processes share it. One of them fetches a shard, the others wait or do something else. Where
    there is no room, those that were used least recently are removed, but none that a process at
    work has announced (`using`). A file that is removed while it is read stays readable to its
    end: the system keeps it until the last that has it open closes it.

    UserError for a folder that cannot be written, and for a full disk.
    """

    folder: Path
    gigabytes: float | None = None

    @classmethod
    def at(cls, folder: Path | None, gigabytes: float | None) -> "ShardCache":
        """Return the cache in `folder`; None: in this machine's folder for caches."""
        place = cache_folder() / "shards" if folder is None else Path(folder).expanduser()
        return cls(place.absolute(), gigabytes)

    def check_gigabytes(self, largest: int) -> None:
        """UserError if the size that is given is less than a shard of `largest` bytes."""
        if self.gigabytes is not None and largest > self.gigabytes * _GB:
            raise UserError(
                f"data.cache_gb = {self.gigabytes:g} is less than the largest shard, "
                f"{largest / _GB:.3g} GB; give that at least, better the size of the set"
            )

    def check(self, largest: int) -> None:
        """UserError if the folder cannot be used, or not hold one shard of `largest` bytes."""
        self.check_gigabytes(largest)
        with self._explained():
            self._make_folders()
            with self._locked():
                limit = self._limit(sum(size for _, size, _ in self._entries()))
        if largest > limit:
            raise UserError(
                f"data.cache_dir {self.folder}: its disk has {limit / _GB:.3g} GB for shards, the "
                f"largest has {largest / _GB:.3g}; free some space or name a folder on another disk"
            )

    @contextmanager
    def using(self, digests: Iterable[str]) -> Iterator[None]:
        """Keep these shards from being removed to make room, until the context or process ends."""
        with self._explained():
            self._make_folders()
            with self._locked():
                path = self.folder / "users" / f"{os.getpid()}-{next(_number)}"
                file = path.open("w")
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write("\n".join(digests))
                file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError), self._locked():
                path.unlink()
            file.close()

    def open(self, digest: str, size: int) -> int | None:
        """Return a descriptor of a shard, to be closed by the caller; None if it is not here."""
        with self._explained():
            try:
                handle = os.open(self._place(digest), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            if os.fstat(handle).st_size != size:  # cut by a loss of power
                os.close(handle)
                return None
            with contextlib.suppress(PermissionError):  # of another user's cache
                os.utime(handle)  # the time of its last use
            return handle

    def fetch(
        self,
        digest: str,
        size: int,
        read: Callable[[int, int], bytes],
    ) -> Outcome:
        """Bring a shard here if it is not; `read` gives (offset, count) of it.

        OtherContentError if what it gives is not what the digest says; nothing is kept then, nor
        when `read` raises.
        """
        with self._explained(), self._locked():
            place = self._place(digest)
            if place.exists() and place.stat().st_size == size:
                return Outcome.HERE
            handle = self._claimed(digest)
            if handle is None:
                return Outcome.ELSEWHERE
            room = False
            try:
                if self._make_room(size):
                    _reserve(handle, size)
                    room = True
            finally:
                if not room:
                    self._partial(digest).unlink()
                    os.close(handle)
            if not room:
                return Outcome.NO_ROOM
        try:
            found = hashlib.sha256()
            for offset in range(0, size, CHUNK_BYTES):
                data = read(offset, min(CHUNK_BYTES, size - offset))
                found.update(data)
                with self._explained():
                    _write(handle, data, offset)
            if found.hexdigest() != digest:
                raise OtherContentError(found.hexdigest())
            with self._explained():
                os.fsync(handle)
                with self._locked():
                    self._partial(digest).replace(self._place(digest))
        except BaseException:
            with self._locked():
                self._partial(digest).unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        return Outcome.HERE

    # --- files and locks -------------------------------------------------------------------------

    def _place(self, digest: str) -> Path:
        return self.folder / "objects" / digest

    def _partial(self, digest: str) -> Path:
        return self.folder / "objects" / f"{digest}{_PARTIAL}"

    def _make_folders(self) -> None:
        for name in ("objects", "users"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Be the only process that adds, names or removes files; for milliseconds."""
        with (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _claimed(self, digest: str) -> int | None:
        """Return a shard's file to be written, locked; None if a process that lives is at it."""
        handle = os.open(self._partial(digest), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if _lock(handle):
            os.ftruncate(handle, 0)  # what a process that died has left
            return handle
        os.close(handle)
        return None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn an error of the disk into a UserError with the remedy."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise UserError(
                f"data.cache_dir {self.folder}: the disk is full; free some space, or set "
                "data.cache_gb to what it has room for"
                if full
                else f"data.cache_dir {self.folder}: cannot be used "
                f"({error.strerror or error}); name a folder on a disk of this machine"
            ) from error

    # --- room ------------------------------------------------------------------------------------

    def _entries(self) -> list[tuple[Path, int, float]]:
        """Path, size and time of last use of every file; what dead processes began is removed."""
        found = []
        for path in (self.folder / "objects").iterdir():
            if path.suffix == _PARTIAL and _is_left(path):
                path.unlink()
                continue
            facts = path.stat()
            found.append((path, facts.st_size, facts.st_mtime))
        return found

    def _limit(self, used: int) -> int:
        if self.gigabytes is not None:
            return round(self.gigabytes * _GB)
        disk = shutil.disk_usage(self.folder)
        return used + disk.free - round(disk.total * FREE_SHARE)

    def _make_room(self, size: int) -> bool:
        """Remove shards that are not in use until `size` bytes fit; whether they do.

        Nothing is removed if it would not suffice.
        """
        entries = self._entries()
        used = sum(bytes_ for _, bytes_, _ in entries)
        excess = used + size - self._limit(used)
        if excess <= 0:
            return True
        kept = self._in_use()
        removable = [
            (last_use, path, bytes_)
            for path, bytes_, last_use in entries
            if path.suffix != _PARTIAL and path.name not in kept
        ]
        if sum(bytes_ for _, _, bytes_ in removable) < excess:
            return False
        for _, path, bytes_ in sorted(removable):
            if excess <= 0:
                break
            path.unlink()
            excess -= bytes_
        return True

    def _in_use(self) -> set[str]:
        """Return what processes that live have announced; the notes of dead ones are removed."""
        found: set[str] = set()
        for path in (self.folder / "users").iterdir():
            if _is_left(path):
                path.unlink()
            else:
                found.update(path.read_text().split())
        return found


def _lock(file: int | TextIOWrapper) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_left(path: Path) -> bool:
    """Whether nobody holds the lock of a file any more."""
    with path.open() as file:
        return _lock(file)


def _reserve(handle: int, size: int) -> None:
    """Take a file's space on the disk, so that others see that it is taken."""
    if not size:
        return
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(handle, size)  # of some file systems it cannot be taken


def _write(handle: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
