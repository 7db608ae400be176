"""A folder on a machine's own disk that keeps shards of object stores for all its processes."""

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from io import TextIOWrapper
from pathlib import Path

from pipelines.remote.unfinished import BLOCKS, DATA, Unfinished
from sbf_dist.errors import UserError
from sbf_dist.files import cache_folder

CHUNK_BYTES = 2 << 20  # of a request
FREE_SHARE = 1 / 20  # of the disk that stays free where no size is given
_GB = 10**9
_number = itertools.count()


class OtherContentError(Exception):
    """What came has another digest than what was asked for."""


class Outcome(Enum):
    """What came of fetching a shard.

    HERE: it is whole. BEGUN: parts of it are kept. ELSEWHERE: another process or thread fetches it.
    """

    HERE = auto()
    BEGUN = auto()
    ELSEWHERE = auto()
    NO_ROOM = auto()


@dataclass(frozen=True)
class ShardCache:
    """Shards by their SHA-256, in files that are there as a whole or not at all.

    folder     on a disk of this machine: locks are flock's, which go with their process
    gigabytes  of 10^9 bytes, that all shards may take; None: all but a twentieth of the disk

    Processes share it, also the parts of shards that are not whole yet. One of them fetches what is
    missing, the others wait or do something else. Where there is no room, those that were used
    least recently are removed, but none that a process at work has announced (`using`). A file that
    is removed while it is read stays readable to its end: the system keeps it until the last that
    has it open closes it.

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

    def read(self, digest: str, size: int, offset: int, count: int) -> bytes | None:
        """Return a part of a shard, None if it is not here. It may be damaged: see Unfinished."""
        handle = self.open(digest, size)
        if handle is None:
            with self._explained():
                return self._unfinished(digest, size).read(offset, count)
        try:
            return os.pread(handle, count, offset)
        finally:
            os.close(handle)

    def begin(self, digest: str, size: int) -> Outcome:
        """Make room for a shard, of which parts are kept from now on (`keep`).

        HERE if it is whole, BEGUN if not. What a process that has ended left of it still counts.
        """
        unfinished = self._unfinished(digest, size)
        with self._explained(), self._locked():
            if self._is_whole(digest, size):
                return Outcome.HERE
            if unfinished.exists():
                return Outcome.BEGUN
            unfinished.remove()
            if not self._make_room(size):
                return Outcome.NO_ROOM
            unfinished.create()
            return Outcome.BEGUN

    def keep(self, digest: str, size: int, offset: int, data: bytes) -> None:
        """Keep a part of a shard that was begun; nothing is written once it is whole."""
        with self._explained():
            self._unfinished(digest, size).write(offset, data)

    def fetch(
        self,
        digest: str,
        size: int,
        read: Callable[[int, int], bytes],
        *,
        wait: Callable[[], object] = lambda: None,
    ) -> Outcome:
        """Bring here what is missing of a shard; `read` gives (offset, count) of it.

        Before each look at what is missing it calls `wait`, during which others may keep parts.
        OtherContentError if the whole is not what the digest says; nothing is kept then. When
        `read` raises, what has come stays and need not come again.
        """
        begun = self.begin(digest, size)
        if begun is not Outcome.BEGUN:
            return begun
        unfinished = self._unfinished(digest, size)
        with self._explained(), self._locked():
            if not unfinished.exists():  # finished or removed meanwhile
                return Outcome.ELSEWHERE
            claim = unfinished.claim()
        if claim is None:
            return Outcome.ELSEWHERE
        try:
            while True:
                wait()
                gap = unfinished.gap(CHUNK_BYTES)
                if gap is None:
                    break
                data = read(*gap)
                with self._explained():
                    unfinished.write(gap[0], data)
            with self._explained():
                found = unfinished.digest()
            if found != digest:
                raise OtherContentError(found)
            with self._explained(), self._locked():
                unfinished.data.replace(self._place(digest))
                unfinished.remove()
        except (OtherContentError, UserError):  # it is of no use, or the disk is full
            with self._locked():
                unfinished.remove()
            raise
        finally:
            os.close(claim)
        return Outcome.HERE

    # --- files and locks -------------------------------------------------------------------------

    def _place(self, digest: str) -> Path:
        return self.folder / "objects" / digest

    def _unfinished(self, digest: str, size: int) -> Unfinished:
        return Unfinished(self._place(digest), size)

    def _is_whole(self, digest: str, size: int) -> bool:
        place = self._place(digest)
        return place.exists() and place.stat().st_size == size

    def _make_folders(self) -> None:
        for name in ("objects", "users"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Be the only process that adds, names or removes files; for milliseconds."""
        with (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

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
        """Path, size and time of last use of every shard, whole or not."""
        found = []
        for path in (self.folder / "objects").iterdir():
            if path.suffix == BLOCKS:
                continue  # goes with the other file of its shard
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
            if path.stem not in kept and not _is_being_fetched(path)
        ]
        if sum(bytes_ for _, _, bytes_ in removable) < excess:
            return False
        for _, path, bytes_ in sorted(removable):
            if excess <= 0:
                break
            path.unlink()
            path.with_suffix(BLOCKS).unlink(missing_ok=True)
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


def _is_being_fetched(path: Path) -> bool:
    """Whether somebody finishes this shard."""
    if path.suffix != DATA:
        return False
    try:
        return not _is_left(path.with_suffix(BLOCKS))
    except FileNotFoundError:
        return False
