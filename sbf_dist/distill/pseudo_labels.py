"""Pseudo-labels on disk: the teachers' probabilities, written once, read by every worker.

A store is a folder of Parquet files, one per chunk of sample ids, and a manifest that says what
they come from. Chunks do not depend on the number of writers: a job that was stopped goes on
with the chunks that are missing, on any number of workers.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sbf_dist.errors import UserError
from sbf_dist.files import replacing, write_json
from sbf_dist.recipe import Recipe
from sbf_dist.settings import PseudoLabels

FORMAT = 1
CHUNK_IMAGES = 1024  # images per file
MANIFEST = "manifest.json"
REPEAT = "write them again (--again pseudo-labels)"


@dataclass(frozen=True)
class StoredLabels:
    """The content of a store, by ascending sample id.

    ids: (n,) int64; classes: (n, k) int64 and probabilities: (n, k) float32, the k most probable
    classes, descending; entropy: (n,) float32, nats, of the whole distribution.
    """

    ids: NDArray[np.int64]
    classes: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    entropy: NDArray[np.float32]


def origin(recipe: Recipe, data_digest: str) -> dict[str, Any]:
    """Return what the pseudo-labels of a run depend on."""
    fields = recipe.model_dump(mode="json", include={"seed", "teachers"})
    return {
        "teachers": hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest(),
        "data": data_digest,
        "temperature": recipe.pseudo_labels.temperature,
        "top_k": recipe.pseudo_labels.top_k,
    }


def chunks(ids: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Cut ascending sample ids into the store's chunks."""
    return np.split(ids, range(CHUNK_IMAGES, len(ids), CHUNK_IMAGES)) if len(ids) else []


def chunk_path(folder: Path, number: int) -> Path:
    """Return the file of chunk `number`."""
    return folder / f"chunk-{number:05d}.parquet"


def write_chunk(
    folder: Path,
    number: int,
    ids: NDArray[np.int64],
    probabilities: NDArray[np.float32],
    settings: PseudoLabels,
) -> None:
    """Write the distributions (n, classes) of one chunk, in one step."""
    k = min(settings.top_k, probabilities.shape[1])
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    top = np.take_along_axis(probabilities, order, axis=1)
    safe = np.clip(probabilities, 1e-12, None)
    by_id = np.argsort(ids)
    table = pa.table(
        {
            "id": ids[by_id],
            "classes": list(order[by_id].astype(np.int32)),
            "probabilities": list(top[by_id].astype(np.float32)),
            "entropy": (-(probabilities * np.log(safe)).sum(1))[by_id].astype(np.float32),
        }
    )
    with replacing(chunk_path(folder, number)) as partial:
        pq.write_table(table, partial)


def begin(folder: Path, origin: Mapping[str, object]) -> None:
    """Open a store of `origin` (digests, temperature); chunks of another are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    origin_file = folder / "origin.json"
    if _read_json(origin_file) != dict(origin):
        for path in (*folder.glob("chunk-*.parquet"), folder / MANIFEST):
            path.unlink(missing_ok=True)
        write_json(origin_file, origin)


def finish(folder: Path, ids: NDArray[np.int64]) -> None:
    """Write the manifest once every chunk of `ids` is there."""
    parts = chunks(ids)
    missing = [n for n in range(len(parts)) if not chunk_path(folder, n).exists()]
    assert not missing, f"chunks {missing} of {folder} were not written"
    manifest = {
        "format": FORMAT,
        "origin": json.loads((folder / "origin.json").read_text()),
        "images": len(ids),
        "chunks": len(parts),
    }
    write_json(folder / MANIFEST, manifest)


def load(folder: Path, origin: Mapping[str, object]) -> StoredLabels:
    """Read a complete store that was written from `origin`.

    Raises UserError if it is partial, damaged, or stale, naming what differs.
    """
    if not (folder / MANIFEST).exists():
        raise UserError(
            f"pseudo-labels {folder} are not complete (no {MANIFEST}); run the stage pseudo-labels"
        )
    manifest = _read_json(folder / MANIFEST)
    if manifest is None or not {"format", "origin", "images", "chunks"} <= manifest.keys():
        raise UserError(f"pseudo-labels {folder}: {MANIFEST} is damaged; {REPEAT}")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"pseudo-labels {folder}: format {manifest['format']}, this version reads {FORMAT}; "
            f"{REPEAT}"
        )
    for key, value in origin.items():
        if manifest["origin"].get(key) != value:
            raise UserError(
                f"pseudo-labels {folder} are stale: they were written with {key} = "
                f"{manifest['origin'].get(key)!r}, this run has {value!r}; "
                f"{REPEAT}"
            )
    tables = [_read_chunk(chunk_path(folder, n)) for n in range(manifest["chunks"])]
    table = pa.concat_tables(tables)
    if len(table) != manifest["images"]:
        raise UserError(
            f"pseudo-labels {folder}: {len(table)} images instead of {manifest['images']}; {REPEAT}"
        )
    return StoredLabels(
        ids=table["id"].to_numpy(),
        classes=_matrix(table["classes"]).astype(np.int64),
        probabilities=_matrix(table["probabilities"]),
        entropy=table["entropy"].to_numpy(),
    )


def _matrix(lists: pa.ChunkedArray) -> NDArray[Any]:
    return pc.list_flatten(lists).to_numpy().reshape(len(lists), -1)


def _read_chunk(path: Path) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(path.read_bytes()))
    except FileNotFoundError:
        raise UserError(f"pseudo-labels: {path} is missing; {REPEAT}") from None
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"pseudo-labels: {path} is damaged ({reason}); {REPEAT}") from None


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a file, or None without a readable one."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
