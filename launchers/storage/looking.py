"""Places that a command only looks at: folders of this machine, or addresses."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launchers.storage.working_copy import is_plain
from sbf_dist.errors import UserError
from sbf_dist.object_storage import ObjectFolder, is_address
from sbf_dist.patience import patiently


@dataclass(frozen=True)
class Looked:
    """A place at `path` of this machine, which is called `given`."""

    path: Path
    given: str

    def named(self, text: object) -> str:
        """Return a text that names paths, or a path, with what was given instead."""
        return str(text).replace(str(self.path), self.given)


@contextmanager
def looked_at(place: str, wanted: Callable[[str], bool] = lambda key: True) -> Iterator[Looked]:
    """Give a place on this machine: that of an address is fetched, and removed again.

    wanted  which of its objects, by key, are fetched; of the others their folders are there

    A UserError that is raised in the context names the address. UserError where nothing is there.
    """
    if not is_address(place):
        yield Looked(Path(place), place)
        return
    folder = ObjectFolder.at(place)
    keys = list(patiently(folder.objects))
    with tempfile.TemporaryDirectory(prefix="sbf-looked-at-") as here:
        looked = Looked(Path(here) / "x", folder.address)
        if not keys:
            _fetch_one(folder, looked.path)
        for key in filter(is_plain, keys):
            path = looked.path / key
            path.parent.mkdir(parents=True, exist_ok=True)
            if wanted(key):
                patiently(lambda key=key, path=path: folder.fetch(key, path))  # type: ignore[misc]
        try:
            yield looked
        except UserError as error:
            raise UserError(looked.named(error)) from error


def _fetch_one(folder: ObjectFolder, path: Path) -> None:
    """Fetch the object that an address is of."""
    above, _, key = folder.address.rpartition("/")
    try:
        if above.endswith("/"):  # a bucket alone
            raise FileNotFoundError
        patiently(lambda: ObjectFolder.at(above).fetch(key, path))
    except FileNotFoundError:
        raise UserError(f"{folder.address}: nothing is there") from None
