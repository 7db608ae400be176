"""What a prepared set says about itself: manifest.json and samples.parquet in its folder."""

import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.roots import Root, holds, read
from sbf_dist.errors import UserError
from sbf_dist.files import write_bytes, write_json
from sbf_dist.object_storage import ObjectFolder

MANIFEST = "manifest.json"
SAMPLES = "samples.parquet"
WORK = ".preparing"
LAYOUTS = ("folder", "webdataset")
CLASSES = {"cifar10": 10, "cifar100": 100, "tiny-imagenet": 200, "imagenet": 1000}
_FORMAT = 1
_DIGEST = r"^[0-9a-f]{64}$"
_FILE = r"^(train|val)/[^/.][^/]*/[^/.][^/]*$"

SCHEMA = pa.schema(
    [
        ("file", pa.string()),  # "train/CLASS/NAME", sorted
        ("label", pa.int64()),  # position in the manifest's classes
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("height", pa.int64()),  # upright, pixels; 0 for a fault
        ("width", pa.int64()),
        ("fault", pa.string()),  # why it cannot be decoded; null where it can
        ("shard", pa.int64()),  # position in the manifest's shards; −1: a file of its own
        ("offset", pa.int64()),  # of the first byte in the shard
    ]
)


@dataclass(frozen=True)
class Manifest:
    """manifest.json.

    set       cifar10, cifar100, tiny-imagenet or imagenet
    layout    "folder": files in class folders; "webdataset": tar files
    seed      of the samples' order in the shards
    archives  name, bytes, md5 and whether that is the published one
    classes   in the order of labels: folder, name, and the number of images in train and val
    counts    images in train and val
    content   SHA-256 over all names and digests: the same for both layouts
    samples   SHA-256 of samples.parquet
    shards    file, bytes, sha256, index_sha256 and samples of every tar file
    """

    set: str
    layout: str
    seed: int
    archives: list[dict[str, Any]]
    classes: list[dict[str, Any]]
    counts: dict[str, int]
    content: str
    samples: str
    shards: list[dict[str, Any]]

    def write(self, root: Path) -> None:
        """Put manifest.json into `root` in one step."""
        write_json(root / MANIFEST, {"format": _FORMAT, **asdict(self)})


def is_prepared(root: Root) -> bool:
    """Whether `root` is a prepared set: others may have a manifest.json, but not both files."""
    return holds(root, MANIFEST) and holds(root, SAMPLES)


def read_manifest(root: Root) -> Manifest:
    """UserError if `root` has no manifest, or one that this version cannot read."""
    path = f"{root}/{MANIFEST}"
    try:
        content = json.loads(read(root, MANIFEST))
        if content.pop("format") != _FORMAT:
            raise UserError(
                f"data {path}: was written by another version of this program; prepare it again"
            )
        manifest = Manifest(**content)
        if manifest.layout not in LAYOUTS:
            raise ValueError(f"layout {manifest.layout!r}")
        # Paths are joined with root below: they must stay in it.
        for shard in manifest.shards:
            if Path(shard["file"]).name != shard["file"]:
                raise ValueError(f"shard {shard['file']!r}")
            # The digest is the name of the shard in a cache.
            if not re.fullmatch(_DIGEST, shard["sha256"]) or int(shard["bytes"]) < 0:
                raise ValueError(f"shard {shard['file']!r}: digest or size")
    except FileNotFoundError:
        hint = "; its preparation is not finished" if _is_begun(root) else ""
        raise UserError(f"data {root}: has no {MANIFEST}{hint}; see sbf data prepare") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"data {path}: cannot be read ({error}); prepare the set again") from error
    return manifest


def _is_begun(root: Root) -> bool:
    if isinstance(root, ObjectFolder):
        return bool(root.child(WORK).names())
    return (root / WORK).exists()


def read_samples(root: Root, manifest: Manifest) -> pa.Table:
    """samples.parquet; UserError if it is missing or is not the manifest's."""
    path = f"{root}/{SAMPLES}"
    try:
        data = read(root, SAMPLES)
    except OSError as error:
        reason = error.strerror or "it is missing"
        raise UserError(f"data {path}: cannot be read ({reason}); prepare it again") from None
    if hashlib.sha256(data).hexdigest() != manifest.samples:
        raise UserError(f"data {path}: does not belong to {MANIFEST}; prepare the set again")
    try:
        table = pq.read_table(pa.BufferReader(data)).cast(SCHEMA)
    except pa.ArrowException as error:
        raise UserError(f"data {path}: cannot be read ({error}); prepare the set again") from error
    honest = (
        pc.all(pc.match_substring_regex(table["file"], _FILE), min_count=0),
        pc.all(pc.match_substring_regex(table["sha256"], _DIGEST), min_count=0),
        pc.all(pc.and_(*_within(table["label"], 0, len(manifest.classes))), min_count=0),
        pc.all(pc.and_(*_within(table["shard"], -1, len(manifest.shards))), min_count=0),
    )
    if not all(it.as_py() for it in honest):
        raise UserError(
            f"data {path}: has files, classes or shards that {MANIFEST} does not have; "
            "prepare the set again"
        )
    return table


def _within(column: pa.ChunkedArray, low: int, high: int) -> tuple[pa.Array, pa.Array]:
    return pc.greater_equal(column, low), pc.less(column, high)


def write_samples(root: Path, table: pa.Table) -> str:
    """Write samples.parquet; return its SHA-256."""
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    write_bytes(root / SAMPLES, file.getvalue())
    return hashlib.sha256(file.getvalue()).hexdigest()
