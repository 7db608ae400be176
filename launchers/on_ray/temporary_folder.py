"""A folder for the files of a run's own Ray, for this user only, removed at the end or later."""

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "sbf-run-"
# Ray makes Unix sockets below it, whose paths the kernel limits to 107 characters.
_MAX_BASE_LENGTH = 15


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Give a folder that nobody else may enter, locked while the context lasts.

    Those of this user that nobody has locked are removed before: their processes were killed. A
    lock goes with its process, and holds in all containers that share the folder, where numbers of
    processes say nothing.
    """
    base = Path(tempfile.gettempdir())
    if len(str(base)) > _MAX_BASE_LENGTH:
        base = Path("/tmp")
    for old in base.glob(f"{_PREFIX}*"):
        _remove_if_left_over(old)
    folder, lock = _make(base)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make(base: Path) -> tuple[Path, int]:
    """Return a new folder and its lock. Another start may take it for left over until it is locked:
    then it is gone, and another one is made.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        lock = _open(folder)
        if lock is None:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if os.path.samestat(folder.stat(), os.fstat(lock)):
                return folder, lock
        except FileNotFoundError:
            pass
        os.close(lock)


def _remove_if_left_over(folder: Path) -> None:
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return
    lock = _open(folder)
    if lock is None:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:  # its process lives
        pass
    finally:
        os.close(lock)


def _open(folder: Path) -> int | None:
    """Open a folder to lock it; None if it is gone, or something else took its place."""
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
