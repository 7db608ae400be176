"""The work of a preparation: units that are done in parallel, and noted when they are whole."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.inspection import inspect_bytes
from pipelines.sources.archives import Progress
from pipelines.sources.catalogue import Catalogue
from pipelines.sources.manifest import SCHEMA, WORK
from pipelines.sources.shards import MAX_SHARD_BYTES, shuffled_runs, write_shard
from pipelines.sources.uploading import Upload
from sbf_dist.errors import UserError
from sbf_dist.files import read_json, replacing, write_text

_log = logging.getLogger(__name__)

IMAGES_PER_UNIT = 500  # images of a unit of work in the layout "folder"
IMAGES_PER_REPORT = 50  # images between two reports


@dataclass(frozen=True)
class Unit:
    """What is done in one go: some images, of one shard or of none."""

    name: str
    rows: NDArray[np.int64]
    shard: str | None = None


def units(layout: str, catalogue: Catalogue, seed: int) -> list[Unit]:
    """All units of a set, in the order in which they are done."""
    rows = np.arange(len(catalogue))
    if layout == "folder":
        return [
            Unit(f"{start:08}", rows[start : start + IMAGES_PER_UNIT])
            for start in range(0, len(catalogue), IMAGES_PER_UNIT)
        ]
    in_train = np.array([file.startswith("train/") for file in catalogue.files])
    return [
        Unit(f"{part}-{number:06}", run, f"{part}-{number:06}.tar")
        for part, those in (("train", rows[in_train]), ("val", rows[~in_train]))
        for number, run in enumerate(shuffled_runs(catalogue.sizes, those, seed=seed))
    ]


def _threads() -> int:
    """Two a processor: reading, hashing and writing all let go of the interpreter."""
    return 2 * len(os.sched_getaffinity(0))


class Work:
    """The units of a preparation, and which of them are done.

    A unit's note in .preparing/notes is written after its files: image by image bytes, digest,
    height, width, fault and offset, and the shard's record where there is one.

    With `upload`, shards go to an object store one by one, and `out` holds no more of them than are
    worked on; of a note the store has a copy.
    """

    def __init__(
        self,
        out: Path,
        layout: str,
        catalogue: Catalogue,
        units: list[Unit],
        progress: Progress | None,
        upload: Upload | None = None,
    ) -> None:
        self.out, self.catalogue, self.upload = out, catalogue, upload
        self._layout, self._units = layout, units
        self._progress = progress
        self._written = out / WORK / "made"
        self._done = 0
        self._stopped = False

    def perform(self) -> None:
        """Do the units that are not done."""
        (self.out / WORK / "notes").mkdir(exist_ok=True)
        self._written.mkdir(exist_ok=True)
        if self.upload is not None:
            self.upload.bring_notes(self.out / WORK / "notes")
        open_units = [unit for unit in self._units if not self._is_done(unit)]
        self._check_space(open_units)
        for folder in {Path(file).parent for file in self.catalogue.files}:
            if self._layout == "folder" and open_units:
                (self._written / folder).mkdir(parents=True, exist_ok=True)
        self._done = len(self.catalogue) - sum(len(unit.rows) for unit in open_units)
        with ThreadPoolExecutor(_threads()) as pool:
            running: list[Future[None]] = []
            try:
                running = [pool.submit(self._perform, unit) for unit in open_units]
                wait(running, return_when=FIRST_EXCEPTION)
                for future in running:
                    if future.done():
                        future.result()
            finally:
                self._stopped = True
                pool.shutdown(cancel_futures=True)

    def _is_done(self, unit: Unit) -> bool:
        """Whether a unit's note and all its files are there."""
        if not self._note(unit).exists():
            return False
        try:
            note = self._noted(unit)
        except UserError as error:
            _log.warning("%s; its images are written anew", error)
            return False
        if unit.shard is None:
            names = [self.catalogue.files[row] for row in unit.rows]
            sizes = [image[0] for image in note["images"]]
        else:
            names, sizes = [unit.shard], [note["shard"]["bytes"]]
        return all(self._size(name) == size for name, size in zip(names, sizes, strict=True))

    def _size(self, name: str) -> int | None:
        if self.upload is not None:
            return self.upload.sizes.get(name)
        # The last step moves files out of the work folder; it too may have been cut.
        for folder in (self._written, self.out):
            try:
                return (folder / name).stat().st_size
            except FileNotFoundError:
                continue
        return None

    def _check_space(self, units: list[Unit]) -> None:
        needed = sum(int(self.catalogue.sizes[unit.rows].sum()) for unit in units)
        if self.upload is not None:
            needed = min(needed, _threads() * MAX_SHARD_BYTES)
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise UserError(
                f"data {self.out}: needs {needed / 1e9:.1f} GB more, the disk has "
                f"{free / 1e9:.1f} GB free; choose a folder on another disk"
                + ("" if self.upload is None else " with SBF_DIST_CACHE")
            )

    def _perform(self, unit: Unit) -> None:
        """Write the files of a unit, then its note."""
        images: list[list[Any]] = []
        record = None
        if unit.shard is None:
            for name, _, data in self._samples(unit, images):
                (self._written / name).write_bytes(data)
        else:
            path = self._written / unit.shard
            with replacing(path) as partial:
                shard = write_shard(partial, self._samples(unit, images))
            for image, offset in zip(images, shard.offsets, strict=True):
                image.append(offset)
            write_text(path.with_suffix(".idx"), shard.index)
            record = {
                "file": path.name,
                "bytes": shard.bytes,
                "sha256": shard.sha256,
                "index_sha256": hashlib.sha256(shard.index.encode()).hexdigest(),
                "samples": len(unit.rows),
            }
            if self.upload is not None:
                self.upload.take(path)
                self.upload.take(path.with_suffix(".idx"))
        note = {"images": images, "shard": record}
        write_text(self._note(unit), json.dumps(note))
        if self.upload is not None:
            self.upload.note(self._note(unit))

    def _samples(self, unit: Unit, images: list[list[Any]]) -> Iterator[tuple[str, int, bytes]]:
        """Name, label and bytes of a unit's images; what is noted of them goes to `images`."""
        for row in unit.rows.tolist():
            if self._stopped:
                raise RuntimeError("stopped")
            data = self.catalogue.read(row)
            seen = inspect_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            images.append([len(data), digest, seen.height, seen.width, seen.fault])
            yield self.catalogue.files[row], int(self.catalogue.labels[row]), data
            self._done += 1  # two threads may lose a count: it is for the eye
            if self._progress is not None and (
                self._done % IMAGES_PER_REPORT == 0 or self._done == len(self.catalogue)
            ):
                self._progress("images", self._done, len(self.catalogue), "images")

    def _note(self, unit: Unit) -> Path:
        return self.out / WORK / "notes" / f"{unit.name}.json"

    def _noted(self, unit: Unit) -> dict[str, Any]:
        # Read when it is needed: of a million images, all notes at once would fill a gigabyte.
        return read_json(self._note(unit), "give the same command again, which makes it anew")

    def move(self) -> None:
        """Move what was written to its place; what was moved before is left there."""
        for left in self._written.glob(".*.partial"):  # by a kill
            left.unlink()
        for path in sorted(self._written.iterdir()):
            path.replace(self.out / path.name)

    def shards(self) -> list[dict[str, Any]]:
        """The records of all shards, for the manifest."""
        return [self._noted(unit)["shard"] for unit in self._units if unit.shard is not None]

    def samples(self) -> pa.Table:
        """One row an image, as manifest.SCHEMA, sorted by file."""
        tables = []
        for number, unit in enumerate(self._units):
            # A file has no offset; the last of the six is missing then.
            images = [[*image, 0][:6] for image in self._noted(unit)["images"]]
            sizes, digests, heights, widths, faults, offsets = zip(*images, strict=True)
            columns = {
                "file": [self.catalogue.files[row] for row in unit.rows],
                "label": self.catalogue.labels[unit.rows],
                "bytes": sizes,
                "sha256": digests,
                "height": heights,
                "width": widths,
                "fault": faults,
                "shard": np.full(len(unit.rows), -1 if unit.shard is None else number),
                "offset": offsets,
            }
            tables.append(pa.table(columns, schema=SCHEMA))
        return pa.concat_tables(tables).sort_by("file")
