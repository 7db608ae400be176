"""Where a set of images lies: a folder of this machine, or one in an object store."""

import posixpath
from pathlib import Path
from urllib.parse import urlsplit

from sbf_dist.errors import UserError
from sbf_dist.object_storage import ObjectFolder, is_address
from sbf_dist.patience import patiently

Root = Path | ObjectFolder


def root_of(place: Path | str) -> Root:
    """Return the folder that a path or an address names, from here on independent of this one."""
    if isinstance(place, str) and is_address(place):
        return ObjectFolder.at(place)
    return Path(place).expanduser().absolute()


def read(root: Root, name: str) -> bytes:
    """Return what the file `name` of a set holds. FileNotFoundError where it is missing."""
    if isinstance(root, Path):
        return (root / name).read_bytes()
    return patiently(lambda: root.read(name))


def holds(root: Root, name: str) -> bool:
    """Whether the set has the file `name`."""
    if isinstance(root, Path):
        return (root / name).is_file()
    return patiently(lambda: root.find(name)) is not None


def way(start: Root, there: Root) -> str:
    """Return the relative path from one folder to another: as "../other".

    Links are resolved: "../" leads up from where a folder really is. UserError where one is in an
    object store and the other is not in its bucket.
    """
    if isinstance(start, Path) and isinstance(there, Path):
        return posixpath.relpath(there.resolve(), start.resolve())
    if isinstance(start, ObjectFolder) and isinstance(there, ObjectFolder):
        here, other = urlsplit(start.address), urlsplit(there.address)
        if (here.scheme, here.netloc) == (other.scheme, other.netloc):
            return posixpath.relpath(other.path or "/", here.path or "/")
    raise UserError(
        f"data.unlabelled {there}: must lie where data.root does ({start}): both in folders of "
        "this machine, or both in one bucket"
    )


def located(root: ObjectFolder, name: str) -> tuple[ObjectFolder, str]:
    """Return the folder and the key of a file of a set, whose name may begin with "../"."""
    if not name.startswith("../"):
        return root, name
    parts = urlsplit(root.address)
    key = posixpath.normpath(posixpath.join(parts.path or "/", name))
    return ObjectFolder(f"{parts.scheme}://{parts.netloc}"), key.lstrip("/")
