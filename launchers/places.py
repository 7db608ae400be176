"""Where results go: whether something can be written there, asked before any work."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sbf_dist.errors import UserError


def check_writable(option: str, folder: Path) -> None:
    """UserError if `folder`, given as `option`, cannot be made or written; nothing is left."""
    place = folder.absolute()
    try:
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            what = "is a file" if place == folder.absolute() else f"lies below the file {place}"
            raise UserError(f"{option} {folder}: {what}; name a folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(None, "Permission denied")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{option} {folder}: cannot be written ({reason}); name another folder"
        ) from error


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder for this process; the lock goes with the process, however it ends.

    UserError that calls the folder `what` if another process holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{what} folder {folder} is in use by another sbf {what}; wait for it, or give "
                "another name (name=…)"
            ) from None
        yield
