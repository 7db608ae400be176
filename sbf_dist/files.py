"""Files that are there as a whole or not at all, and their digests."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sbf_dist.errors import UserError

DISK_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EROFS: "the disk is read-only",
}


def cache_folder() -> Path:
    """Return the folder for what can be had again: $SBF_DIST_CACHE, or sbf-dist in the user's own.

    The user's own is as the XDG Base Directory Specification says; nothing is created.
    """
    ours = os.environ.get("SBF_DIST_CACHE", "")
    if ours:
        return Path(ours).expanduser().absolute()
    users = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    folder = Path(users) if Path(users).is_absolute() else Path.home() / ".cache"
    return folder / "sbf-dist"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a place to write a file to that takes the place of `path` once it is whole.

    At any moment, a loss of power included, `path` is the old file or the new one. Where the body
    raises, the old one stays and what was written is removed. The folder of `path` must exist.
    UserError where `path` is a folder or a device, which a file would replace.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no file, and would be replaced by one; give another place")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until the disk holds what is in a file, or the names that are in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_durably(source: Path, target: Path) -> None:
    """Move a file, also to another disk, and return once that disk holds it."""
    shutil.move(source, target)
    flush(target)
    flush(target.parent)


def flush_below(folder: Path) -> None:
    """`flush` all files and folders in `folder`, and itself, so that it can be renamed."""
    for path in folder.rglob("*"):
        if path.is_file() or path.is_dir():
            flush(path)
    flush(folder)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` as `replacing` does; its folder is created where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` as readable JSON, as `write_text` does.

    ValueError for numbers that are not finite, which JSON does not have.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_bytes(path: Path, most: int = -1) -> bytes:
    """Return what a file holds, or the first bytes of it, at most so many.

    Of a pipe, what is written to it; of one that nobody has open for that, nothing, at once: it may
    be a mistake, and would be waited for without end. OSError as `open` raises it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(most)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """Return the object that a JSON file holds. UserError, with the `remedy`, if it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error), remedy) from None
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no object", remedy)
    return content


def _damaged(path: Path, reason: str, remedy: str) -> UserError:
    return UserError(f"{path} is damaged: {reason}" + (f"; {remedy}" if remedy else ""))
