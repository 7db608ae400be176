"""The data index: which images there are, their classes and the part that each plays."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.names import Names
from pipelines.roots import Root, root_of
from sbf_dist.errors import UserError
from sbf_dist.files import replacing, write_json
from sbf_dist.object_storage import ObjectFolder

PARTS = ("labelled", "unlabelled", "validation")
UNKNOWN = -1
NO_SHARD = -1
_FORMAT = 1
INDEX = "index.json"


@dataclass(frozen=True, eq=False)
class Contents:
    """What tells whether the bytes that come out of an object store are those that were indexed.

    shard_bytes    the size of each shard
    shard_digests  its SHA-256, 64 hexadecimal digits
    images         uint8 (n, 32): the SHA-256 of each encoded image
    """

    shard_bytes: list[int]
    shard_digests: list[str]
    images: NDArray[np.uint8]

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "Contents":
        """Return the contents of some of the images; the shards stay."""
        return dataclasses.replace(self, images=self.images[rows])

    @classmethod
    def joined(cls, one: "Contents | None", other: "Contents | None") -> "Contents | None":
        """Return both, one behind the other; None if neither is known."""
        if one is None or other is None:
            assert one is other, "one of two sets is in an object store"
            return None
        return cls(
            one.shard_bytes + other.shard_bytes,
            one.shard_digests + other.shard_digests,
            np.concatenate([one.images, other.images]),
        )


@dataclass(frozen=True, eq=False)
class DataIndex:
    """All usable images below a root. A sample's id is its row, 0 … n − 1; rows are sorted by name.

    root         where the files are: a folder, or one in an object store
    classes      class names; a label is a position in this list
    files        paths relative to root, "/" between folders, as a column (Names) whatever it is
                 given as. Where there are shards: the names of their members.
    labels       int64 (n,): the true class, −1 where unknown. The part "unlabelled" may well have
                 known classes: training must not see them, evaluation may.
    sizes        int64 (n, 2): height and width in pixels, upright
    file_bytes   int64 (n,): size of the encoded image
    parts        "labelled", "unlabelled", "validation" → int64 ids, ascending; no id is in two
    skipped      files that were left out, as "name: reason"
    shards       tar files relative to root that hold the images; none: every image is a file
    shard        int64 (n,): the position in `shards` of each image's tar file, −1 for an image that
                 is a file of its own after all
    offset       int64 (n,): the image's first byte in it; it is file_bytes long, not compressed
    contents     digests, where the root is in an object store
    """

    root: Root
    classes: list[str]
    files: Sequence[str]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    file_bytes: NDArray[np.int64]
    parts: dict[str, NDArray[np.int64]]
    skipped: list[str]
    shards: list[str] = field(default_factory=list)
    shard: NDArray[np.int64] | None = None
    offset: NDArray[np.int64] | None = None
    contents: Contents | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", Names(self.files))
        assert bool(self.shards) == (self.shard is not None) == (self.offset is not None)
        assert isinstance(self.root, ObjectFolder) == (self.contents is not None)

    def __len__(self) -> int:
        return len(self.files)

    def take_files(self, ids: NDArray[np.int64]) -> list[str]:
        """The names of some samples, in their order."""
        assert isinstance(self.files, Names)
        return self.files.take(ids)

    def place(self, sample: int) -> str:
        """Where a sample is, for a message: its file, or its shard and its name there."""
        if self.shard is None or self.shard[sample] == NO_SHARD:
            return f"{self.root}/{self.files[sample]}"
        return f"{self.root}/{self.shards[self.shard[sample]]}:{self.files[sample]}"

    def at(self, root: Path) -> "DataIndex":
        """Return the index of the same images in another folder.

        UserError, naming the first file, where they are not there, by their names and sizes.
        """
        sizes = self.file_bytes.tolist()
        for sample, name in enumerate(self.files):
            if self.shard is not None and self.shard[sample] != NO_SHARD:
                continue
            path = root / name
            if not path.is_file() or path.stat().st_size != sizes[sample]:
                state = "another file" if path.is_file() else "missing"
                raise UserError(
                    f"data {root}: {name} is {state}; the images that were indexed were in "
                    f"{self.root}; prepare the new ones with --again prepare or under another name "
                    "(name=…)"
                )
        for name in self.shards:
            if not (root / name).is_file():
                raise UserError(
                    f"data {root}: {name} is missing; the images that were indexed were in "
                    f"{self.root}; put them back, or give --again prepare"
                )
        return dataclasses.replace(self, root=root, contents=None)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of names, classes, sizes, parts and shards, wherever the root lies."""
        digest = hashlib.sha256(json.dumps([_FORMAT, self.classes]).encode())
        assert isinstance(self.files, Names)
        for number, names in enumerate(self.files.chunks()):
            digest.update(b"\0" * (number > 0) + "\0".join(names).encode())
        arrays = [self.labels, self.sizes, self.file_bytes, self._part_codes()]
        if self.shard is not None and self.offset is not None:
            digest.update(json.dumps(self.shards).encode())
            arrays += [self.shard, self.offset]
        for array in arrays:
            digest.update(np.ascontiguousarray(array, dtype="<i8").data)
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write Parquet (one row a sample) and index.json into `folder`, replacing an older index.

        A kill leaves the old index or the new one: the JSON file names the Parquet file and is
        replaced last. UserError where nothing can be written: a full disk, a read-only one.
        """
        folder = Path(folder)
        try:
            self._save(folder)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise UserError(
                f"index {folder}: cannot be written ({reason}); free some space or choose another "
                "folder"
            ) from error

    def _save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        assert isinstance(self.files, Names)
        names = pa.array([None, *PARTS])
        columns = {
            "file": self.files.column,
            "label": self.labels,
            "part": names.take(pa.array(self._part_codes() + 1)).dictionary_encode(),
            "height": self.sizes[:, 0],
            "width": self.sizes[:, 1],
            "bytes": self.file_bytes,
        }
        if self.shards:
            columns |= {"shard": self.shard, "offset": self.offset}
        if self.contents is not None:
            digests = pa.py_buffer(np.ascontiguousarray(self.contents.images))
            columns["sha256"] = pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(32), len(self), [None, digests]
            )
        table = pa.table(columns)
        samples = f"samples-{self.digest[:16]}.parquet"
        about = {
            "format": _FORMAT,
            "root": str(self.root) if isinstance(self.root, Path) else self.root.address,
            "classes": self.classes,
            "shards": self.shards,
            "samples": samples,
            "digest": self.digest,
            "counts": {part: len(ids) for part, ids in self.parts.items()},
            "skipped": self.skipped,
        }
        if self.contents is not None:
            about["shard_bytes"] = self.contents.shard_bytes
            about["shard_digests"] = self.contents.shard_digests
        with replacing(folder / samples) as partial:
            pq.write_table(table, partial)
        write_json(folder / INDEX, about)
        for old in folder.glob("samples-*.parquet"):
            if old.name != samples:
                old.unlink()

    @classmethod
    def load(cls, folder: Path) -> "DataIndex":
        """Read what save wrote. UserError if a file is missing, damaged or of another format."""
        folder = Path(folder)
        again = "index the images again"
        try:
            about = json.loads((folder / INDEX).read_text())
            if about["format"] != _FORMAT:
                raise UserError(
                    f"index {folder}: format {about['format']}, this version reads {_FORMAT}; "
                    f"{again}"
                )
            # Read whole first: an error of pyarrow's does not carry the file's name.
            table = pq.read_table(pa.BufferReader((folder / about["samples"]).read_bytes()))
            columns = {
                name: table[name].to_numpy().astype(np.int64)
                for name in table.column_names
                if name not in ("file", "part", "sha256")
            }
            part = pc.index_in(table["part"].cast(pa.string()), pa.array(PARTS))
            codes = part.fill_null(-1).to_numpy()
            index = cls(
                root=root_of(about["root"]),
                classes=list(about["classes"]),
                files=Names(table["file"]),
                labels=columns["label"],
                sizes=np.stack([columns["height"], columns["width"]], axis=1),
                file_bytes=columns["bytes"],
                parts={name: np.flatnonzero(codes == k) for k, name in enumerate(PARTS)},
                skipped=list(about["skipped"]),
                shards=list(about.get("shards", [])),
                shard=columns.get("shard"),
                offset=columns.get("offset"),
                contents=_contents(about, table),
            )
        except FileNotFoundError as error:
            raise UserError(f"index {folder}: {error.filename} is missing; {again}") from error
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise UserError(f"index {folder}: cannot be read ({error!r}); {again}") from error
        del table  # what Arrow has read is then given back to the system
        pa.default_memory_pool().release_unused()
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


def _contents(about: dict[str, Any], table: pa.Table) -> Contents | None:
    """The digests in the two files of an index, if they have such."""
    if "sha256" not in table.column_names:
        return None
    digests = table["sha256"].combine_chunks()
    column = digests.chunk(0) if isinstance(digests, pa.ChunkedArray) else digests
    images = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, 32)
    # A copy: what Arrow has read is given back to the system.
    images = images[column.offset : column.offset + len(column)].copy()
    return Contents(list(about["shard_bytes"]), list(about["shard_digests"]), images)
