"""Stores of pseudo-labels as training reads them: checked, and mapped into memory.

Parquet is for keeping and for other programs: it has to be decoded. All ranks of a node read one
uncompressed file instead, which the first of them writes beside the chunks. It is mapped: its pages
are in memory once, whatever the number of ranks, and go when others need the room. Safetensors is
its format: PyTorch maps such files itself, so tensors and arrays are views of the file.
"""

import fcntl
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from sbf_dist.distill.pseudo_labels import FORMAT, MANIFEST, MAPPED, chunk_path, read_json
from sbf_dist.errors import UserError
from sbf_dist.files import replacing, sha256

_FORMATS = (1, FORMAT)
_LOCK = ".mapped.lock"
_REPEAT = "write them again (--again pseudo-labels)"
_KEYS = {"format", "origin", "images", "chunks"}


@dataclass(frozen=True)
class StoredLabels:
    """The content of a store, by ascending sample id; integers and floats as they were written.

    ids            int64 (n,)
    classes        int16 or int32 (n, k): the ensemble's most probable classes, descending
    probabilities  float16 (n, k): theirs
    entropy        float16 (n,): of the whole distribution, nats
    margin         float16 (n,): between the two most probable classes
    agreement      float32 (n,): share of the teachers whose first class is the ensemble's; None in
                   stores of format 1, which also have float32 for float16 and int32 for int16
    """

    ids: NDArray[np.int64]
    classes: NDArray[np.signedinteger[Any]]
    probabilities: NDArray[np.floating[Any]]
    entropy: NDArray[np.floating[Any]]
    margin: NDArray[np.floating[Any]]
    agreement: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class of each image."""
        return self.classes[:, 0].astype(np.int64)

    @property
    def confidence(self) -> NDArray[np.float32]:
        """Its probability."""
        return self.probabilities[:, 0].astype(np.float32)

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the places of some samples. A sample that is not stored is our own bug."""
        places = np.searchsorted(self.ids, ids).clip(max=max(0, len(self.ids) - 1))
        assert len(ids) == 0 or (self.ids[places] == ids).all(), "an image has no pseudo-label"
        return places

    def take(self, ids: NDArray[np.int64]) -> "StoredLabels":
        """Return the labels of some samples, in their order, as a copy."""
        rows = self.rows(ids)
        return StoredLabels(**{name: column[rows] for name, column in self.columns().items()})

    def columns(self) -> dict[str, Any]:
        """Return the arrays by their names, without those that are not known."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in found.items() if column is not None}


def load(folder: Path, origin: Mapping[str, object]) -> StoredLabels:
    """Map a complete store that was written from `origin` into memory.

    Raises UserError if it is partial, damaged, or stale, naming what differs.
    """
    manifest = read_manifest(folder)
    _check_origin(folder, manifest, origin)
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    mapped = folder / MAPPED.replace("*", digest[:16])
    if not mapped.exists():
        with _alone(folder):
            if not mapped.exists():
                _write_mapped(mapped, _read(folder, manifest))
    with safe_open(mapped, "pt") as file:
        names = file.keys()
        return StoredLabels(**{name: file.get_tensor(name).numpy() for name in names})


def read(folder: Path) -> StoredLabels:
    """Read a complete store, whatever it was written from, and write nothing.

    Raises UserError if it is partial or damaged.
    """
    return _read(folder, read_manifest(folder))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what a complete store says of itself. UserError for one that is partial or damaged."""
    if not (folder / MANIFEST).exists():
        raise UserError(
            f"pseudo-labels {folder} are not complete (no {MANIFEST}); run the stage pseudo-labels"
        )
    manifest = read_json(folder / MANIFEST)
    if manifest is None or not manifest.keys() >= _KEYS:
        raise UserError(f"pseudo-labels {folder}: {MANIFEST} is damaged; {_REPEAT}")
    if manifest["format"] not in _FORMATS:
        raise UserError(
            f"pseudo-labels {folder}: format {manifest['format']}, this version reads "
            f"{' and '.join(map(str, _FORMATS))}; {_REPEAT}"
        )
    return manifest


def _check_origin(folder: Path, manifest: Mapping[str, Any], origin: Mapping[str, object]) -> None:
    for key, value in origin.items():
        before = manifest["origin"].get(key)
        if before == value or (key == "weights" and manifest["format"] == 1):  # which noted none
            continue
        what, now = key, value
        if isinstance(before, dict) and isinstance(value, dict):
            name = next(n for n in (*value, *before) if value.get(n) != before.get(n))
            what, before, now = f"{key} of {name}", before.get(name), value.get(name)
        raise UserError(
            f"pseudo-labels {folder} are stale: they were written with {what} = {before!r}, this "
            f"run has {now!r}; {_REPEAT}"
        )


def _read(folder: Path, manifest: Mapping[str, Any]) -> StoredLabels:
    if manifest["format"] == 1:
        tables = [_read_chunk(chunk_path(folder, n)) for n in range(manifest["chunks"])]
    else:
        tables = [
            _read_chunk(chunk_path(folder, number), digest)
            for number, digest in enumerate(manifest["chunks"])
        ]
    table = pa.concat_tables(tables)
    if len(table) != manifest["images"]:
        raise UserError(
            f"pseudo-labels {folder}: {len(table)} images instead of {manifest['images']}; "
            f"{_REPEAT}"
        )
    probabilities = _matrix(table["probabilities"])
    if manifest["format"] == 1:
        margin = probabilities[:, 0].copy()
        margin -= probabilities[:, 1] if probabilities.shape[1] > 1 else 0
    else:
        margin = table["margin"].to_numpy()
    return StoredLabels(
        ids=table["id"].to_numpy(),
        classes=_matrix(table["classes"]),
        probabilities=probabilities,
        entropy=table["entropy"].to_numpy(),
        margin=margin,
        agreement=None if manifest["format"] == 1 else table["agreement"].to_numpy(),
    )


def _matrix(lists: pa.ChunkedArray) -> NDArray[Any]:
    return pc.list_flatten(lists).to_numpy().reshape(len(lists), -1)


def _read_chunk(path: Path, digest: str | None = None) -> pa.Table:
    """Read one chunk; UserError for one that is missing, damaged, or not of that digest."""
    try:
        if digest is not None and sha256(path) != digest:
            raise UserError(
                f"pseudo-labels: {path} is damaged (changed since it was written); {_REPEAT}"
            )
        return pq.read_table(pa.BufferReader(path.read_bytes()))
    except FileNotFoundError:
        raise UserError(f"pseudo-labels: {path} is missing; {_REPEAT}") from None
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"pseudo-labels: {path} is damaged ({reason}); {_REPEAT}") from None


def _write_mapped(path: Path, stored: StoredLabels) -> None:
    for old in path.parent.glob(MAPPED):
        old.unlink()
    with replacing(path) as partial:
        # PyTorch takes no arrays that cannot be written, as Arrow's own.
        save_file({k: torch.tensor(v) for k, v in stored.columns().items()}, partial)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process of those that read the store do something, the others wait."""
    with (folder / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
