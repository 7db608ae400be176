"""Digests of the files that a run reads: weights, lists of images, code of networks."""

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.run.locks import DIGEST, Values, file_of
from sbf_dist import user_code
from sbf_dist.errors import UserError
from sbf_dist.files import sha256
from sbf_dist.models import is_user_code
from sbf_dist.recipe import Recipe

if TYPE_CHECKING:
    from launchers.run.network import Network


def file_digests(recipe: Recipe) -> Values:
    """Return the SHA-256 of every file that a recipe names, by its key and locks.DIGEST.

    A network of the user's own has a key for each file of its code, see locks.file_of.
    UserError for a file that cannot be read.
    """
    return {f"{key}{DIGEST}": _digest(file_of(key), path) for key, path in _files(recipe)}


def weights_digests(networks: "Iterable[Network]") -> dict[str, str]:
    """Return the SHA-256 of the file of each network's weights, by its name.

    UserError for a file that cannot be read.
    """
    return {one.name: _digest(f"weights of {one.name}", one.weights) for one in networks}


def _files(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    for index, teacher in enumerate(recipe.teachers):
        for key in ("weights", "start_from", "classes"):
            path = getattr(teacher, key)
            if path is not None:
                yield f"teachers.{index}.{key}", path
        if is_user_code(teacher.model):
            for name, path in user_code.source_files(teacher.model).items():
                yield f"teachers.{index}.model.{name}", path
    if recipe.data.split is not None:
        yield "data.split", recipe.data.split


@cache
def _digest_of(path: Path, *_: int) -> str:
    """The digest of a file that is as it was: weights of gigabytes are asked for at each stage."""
    return sha256(path)


def _digest(key: str, path: Path) -> str:
    if not path.exists():
        raise UserError(f"{key} = {str(path)!r} does not exist")
    if not path.is_file():  # of /dev/zero there is no end
        raise UserError(f"{key} = {str(path)!r} must be a file")
    try:
        now = path.stat()
        return _digest_of(path.absolute(), now.st_ino, now.st_size, now.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{key} = {str(path)!r} cannot be read: {error.strerror}") from error
