"""Pseudo-labels on disk: what the teachers predict on every image, written once, read by workers.

A store is a folder of Parquet files, one for each chunk of sample ids, and a manifest that says
what they come from. Chunks do not depend on the number of writers: a job that was stopped goes on
with the chunks that are missing, on any number of workers.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sbf_dist.distill.summaries import Summary
from sbf_dist.files import replacing, sha256, write_json
from sbf_dist.recipe import Recipe

FORMAT = 2
CHUNK_IMAGES = 1024  # images per file
MANIFEST = "manifest.json"
ORIGIN = "origin.json"
MAPPED = ".mapped-*.safetensors"  # what stored_labels makes of the chunks
# Beside zstd. Bytes of floats and of classes lie by significance: smaller by a quarter.
_ENCODINGS = {
    "id": "DELTA_BINARY_PACKED",
    "classes.list.element": "BYTE_STREAM_SPLIT",
    "probabilities.list.element": "BYTE_STREAM_SPLIT",
    "entropy": "BYTE_STREAM_SPLIT",
    "margin": "BYTE_STREAM_SPLIT",
}


def origin(recipe: Recipe, data_digest: str, weights: Mapping[str, str]) -> dict[str, Any]:
    """Return what the pseudo-labels of a run depend on.

    weights  the SHA-256 of each teacher's file of weights, by its name
    """
    fields = recipe.model_dump(mode="json", include={"seed", "teachers"})
    return {
        "teachers": hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest(),
        "weights": dict(weights),
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


def missing(folder: Path, count: int) -> list[int]:
    """Return the numbers, of so many chunks, that are not there yet."""
    return [number for number in range(count) if not chunk_path(folder, number).exists()]


def write_chunk(folder: Path, number: int, ids: NDArray[np.int64], summary: Summary) -> None:
    """Write the predictions on the images `ids`, ascending, in one step.

    Probabilities, entropy and margin are float16, classes int16 where they fit; the agreement,
    which has few values, is a dictionary.
    """
    classes = summary.classes.cpu().numpy()
    narrow = np.int16 if classes.max(initial=0) <= np.iinfo(np.int16).max else np.int32
    half = {
        name: getattr(summary, name).cpu().numpy().astype(np.float16)
        for name in ("probabilities", "entropy", "margin")
    }
    table = pa.table(
        {
            "id": ids,
            "classes": _rows(classes.astype(narrow)),
            "probabilities": _rows(half["probabilities"]),
            "entropy": half["entropy"],
            "margin": half["margin"],
            "agreement": summary.agreement.cpu().numpy(),
        }
    )
    with replacing(chunk_path(folder, number)) as partial:
        pq.write_table(
            table,
            partial,
            compression="zstd",
            use_dictionary=["agreement"],
            column_encoding=_ENCODINGS,
            write_statistics=False,
        )


def begin(folder: Path, origin: Mapping[str, object]) -> None:
    """Open a store of `origin` (digests, temperature); the files of another are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    if read_json(folder / ORIGIN) != dict(origin):
        for path in folder.iterdir():  # fitted temperatures among them
            path.unlink(missing_ok=True)
        write_json(folder / ORIGIN, origin)


def finish(
    folder: Path, ids: NDArray[np.int64], *, classes: Sequence[str], teachers: Sequence[str]
) -> None:
    """Write the manifest once every chunk of `ids` is there.

    classes, teachers  their names, for whoever looks at the store alone
    """
    count = len(chunks(ids))
    left = missing(folder, count)
    assert not left, f"chunks {left} of {folder} were not written"
    manifest = {
        "format": FORMAT,
        "origin": json.loads((folder / ORIGIN).read_text()),
        "images": len(ids),
        "classes": list(classes),
        "teachers": list(teachers),
        "chunks": [sha256(chunk_path(folder, number)) for number in range(count)],
    }
    write_json(folder / MANIFEST, manifest)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a file, or None without a readable one."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _rows(matrix: NDArray[Any]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])
