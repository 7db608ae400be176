"""A preparation whose results go to an object store, shard by shard."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.sources.manifest import MANIFEST, SAMPLES, WORK
from sbf_dist.errors import UserError
from sbf_dist.files import write_bytes
from sbf_dist.object_storage import ObjectFolder
from sbf_dist.patience import patiently

_SETTINGS = "settings.json"
_NOTES = "notes"


class Upload:
    """The folder of a set in an object store while it is prepared.

    What is done stands in notes under .preparing, there as well, so that another machine may go on.
    Two machines that prepare the same set do the same work twice and write the same bytes.
    RunError where the store does not answer for minutes.
    """

    def __init__(self, folder: ObjectFolder) -> None:
        self.folder = folder
        self.sizes: dict[str, int] = {}  # of the objects that were there when notes were brought
        self._work = folder.child(WORK)

    def begin(self, settings: dict[str, Any]) -> None:
        """UserError if what is to go on was begun with other settings."""
        try:
            begun = json.loads(patiently(partial(self._work.read, _SETTINGS)))
        except FileNotFoundError:
            patiently(partial(self._work.write, _SETTINGS, json.dumps(settings).encode()))
            return
        except ValueError as error:
            raise UserError(
                f"{self._work}/{_SETTINGS} is damaged: {error}; remove {self._work} to start again"
            ) from None
        for key, value in settings.items():
            if begun.get(key) != value:
                values = "" if key == "archives" else f" {begun.get(key)}, not {value}"
                raise UserError(
                    f"data {self.folder}: was begun with other {key}{values}; choose another "
                    f"address, or remove {self._work} to start again"
                )

    def bring_notes(self, notes: Path) -> None:
        """Let the folder `notes` hold exactly what the store has noted."""
        self.sizes = {key: it.size for key, it in patiently(self.folder.objects).items()}
        prefix = f"{WORK}/{_NOTES}/"
        there = {key.removeprefix(prefix) for key in self.sizes if key.startswith(prefix)}
        for path in notes.iterdir():
            if path.name not in there:
                path.unlink()
        for name in sorted(there - {path.name for path in notes.iterdir()}):
            data = patiently(partial(self._work.read, f"{_NOTES}/{name}"))
            write_bytes(notes / name, data)

    def take(self, path: Path) -> None:
        """Move a file there."""
        patiently(partial(self.folder.put, path, path.name))
        path.unlink()

    def note(self, path: Path) -> None:
        """Keep a note there, once all that it is of is there."""
        patiently(partial(self._work.put, path, f"{_NOTES}/{path.name}"))

    def finish(self, local: Path) -> None:
        """Write the list of images and, last, the manifest; both stay in `local`, too."""
        for name in (SAMPLES, MANIFEST):
            patiently(partial(self.folder.put, local / name, name))
        self.clean()

    def clean(self) -> None:
        """Remove what the work has left beside a finished set."""
        for key in patiently(self._work.objects):
            patiently(partial(self._work.remove, key))
