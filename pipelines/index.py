"""The data index: which images there are, their classes and the part that each plays."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sbf_dist.errors import UserError

PARTS = ("labelled", "unlabelled", "validation")
UNKNOWN = -1
_FORMAT = 1
_JSON = "index.json"


@dataclass(frozen=True, eq=False)
class DataIndex:
    """All usable images below a root. A sample's id is its row, 0 … n − 1; rows are sorted by name.

    root         where the files are
    classes      class names; a label is a position in this list
    files        paths relative to root, "/" between folders
    labels       int64 (n,): the true class, −1 where unknown. The part "unlabelled" may well have
                 known classes: training must not see them, evaluation may.
    sizes        int64 (n, 2): height and width in pixels, upright
    file_bytes   int64 (n,)
    parts        "labelled", "unlabelled", "validation" → int64 ids, ascending; no id is in two
    skipped      files that were left out, as "name: reason"
    """

    root: Path
    classes: list[str]
    files: list[str]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    file_bytes: NDArray[np.int64]
    parts: dict[str, NDArray[np.int64]]
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of names, classes, sizes and parts: the same wherever the root lies."""
        digest = hashlib.sha256(json.dumps([_FORMAT, self.classes]).encode())
        digest.update("\0".join(self.files).encode())
        for array in (self.labels, self.sizes, self.file_bytes, self._part_codes()):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write Parquet (one row a sample) and index.json into `folder`, replacing an older index.

        A kill leaves the old index or the new one: the JSON file names the Parquet file and is
        replaced last.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = pa.array([None, *PARTS])
        table = pa.table(
            {
                "file": self.files,
                "label": self.labels,
                "part": names.take(pa.array(self._part_codes() + 1)).dictionary_encode(),
                "height": self.sizes[:, 0],
                "width": self.sizes[:, 1],
                "bytes": self.file_bytes,
            }
        )
        samples = f"samples-{self.digest[:16]}.parquet"
        about = {
            "format": _FORMAT,
            "root": str(self.root),
            "classes": self.classes,
            "samples": samples,
            "digest": self.digest,
            "counts": {part: len(ids) for part, ids in self.parts.items()},
            "skipped": self.skipped,
        }
        _replace(folder / samples, lambda path: pq.write_table(table, path))
        _replace(
            folder / _JSON,
            lambda path: path.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n"),
        )
        for old in folder.glob("samples-*.parquet"):
            if old.name != samples:
                old.unlink()

    @classmethod
    def load(cls, folder: Path) -> "DataIndex":
        """Read what save wrote. UserError if a file is missing, damaged or of another format."""
        folder = Path(folder)
        again = "index the images again"
        try:
            about = json.loads((folder / _JSON).read_text())
            if about["format"] != _FORMAT:
                raise UserError(
                    f"index {folder}: format {about['format']}, this version reads {_FORMAT}; "
                    f"{again}"
                )
            # Read whole first: an error of pyarrow's does not carry the file's name.
            table = pq.read_table(pa.BufferReader((folder / about["samples"]).read_bytes()))
            columns = {
                name: table[name].to_numpy().astype(np.int64)
                for name in ("label", "height", "width", "bytes")
            }
            part = np.array(table["part"].to_pylist(), dtype=object)
            index = cls(
                root=Path(about["root"]),
                classes=list(about["classes"]),
                files=table["file"].to_pylist(),
                labels=columns["label"],
                sizes=np.stack([columns["height"], columns["width"]], axis=1),
                file_bytes=columns["bytes"],
                parts={name: np.flatnonzero(part == name).astype(np.int64) for name in PARTS},
                skipped=list(about["skipped"]),
            )
        except FileNotFoundError as error:
            raise UserError(f"index {folder}: {error.filename} is missing; {again}") from error
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise UserError(f"index {folder}: cannot be read ({error!r}); {again}") from error
        if index.digest != about["digest"]:
            raise UserError(f"index {folder}: its two files do not belong together; {again}")
        return index

    def _part_codes(self) -> NDArray[np.int64]:
        """Position in PARTS of each sample's part, −1 for none."""
        codes = np.full(len(self.files), -1, dtype=np.int64)
        for code, part in enumerate(PARTS):
            ids = self.parts[part]
            assert (codes[ids] == -1).all(), f"part {part} shares samples with another"
            codes[ids] = code
        return codes


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside `path`, then put it in its place in one step."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
