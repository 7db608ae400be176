"""Where results go: whether something can be written there, asked before any work."""

import fcntl
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sbf_dist.errors import UserError
from sbf_dist.object_storage import ObjectFolder, StoreUnreachableError

_ADDRESS_AS_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def check_writable(option: str, folder: Path) -> None:
    """UserError if `folder`, given as `option`, cannot be made or written; nothing is left."""
    place = folder.absolute()
    if _ADDRESS_AS_PATH.match(str(folder)):
        raise UserError(f"{option} {folder}: must be a local folder, not an address")
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


def check_store(option: str, address: str) -> None:
    """UserError if nothing can be written at `address`, given as `option`; nothing is left."""
    folder = ObjectFolder.at(address)
    probe = f".probe-{uuid.uuid4().hex}"
    try:
        folder.write(probe, b"")
        folder.remove(probe)
    except (UserError, StoreUnreachableError) as error:
        raise UserError(f"{option} {str(error).replace(f'/{probe}', '')}") from error


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
