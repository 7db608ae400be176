"""Whether a prepared set is still what its manifest says."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipelines.roots import Root, root_of
from pipelines.sources.archives import Progress
from pipelines.sources.manifest import (
    MANIFEST,
    SAMPLES,
    WORK,
    Manifest,
    read_manifest,
    read_samples,
)
from sbf_dist.errors import UserError
from sbf_dist.files import sha256
from sbf_dist.object_storage import ObjectFolder
from sbf_dist.patience import patiently

_CHUNK_BYTES = 8 << 20  # of a request


@dataclass
class Findings:
    """Names of files, relative to the set's folder, sorted; `unreadable` as "name: reason"."""

    files: int
    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    superfluous: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def kinds(self) -> dict[str, list[str]]:
        """What is wrong, kind by kind."""
        return {
            "missing": self.missing,
            "changed": self.changed,
            "superfluous": self.superfluous,
            "unreadable": self.unreadable,
        }

    @property
    def whole(self) -> bool:
        return not any(self.kinds().values())


def check(root: Path | str, progress: Progress | None = None) -> Findings:
    """Compare every file with its SHA-256, and the folder with the list of files.

    Of a set in an object store, given by its address, all shards are read.

    `progress` is called with (title, done, of, unit). UserError if there is no manifest, or if
    manifest.json and samples.parquet contradict each other.
    """
    place = root_of(root)
    manifest = read_manifest(place)
    expected = dict(_expected(place, manifest))
    found = set(_files(place))
    findings = Findings(
        files=len(expected),
        missing=sorted(expected.keys() - found),
        superfluous=sorted(found - expected.keys() - {MANIFEST, SAMPLES}),
    )
    present = sorted(expected.keys() & found)
    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:
        digests = pool.map(lambda name: _digest(place, name), present)
        for done, (name, digest) in enumerate(zip(present, digests, strict=True), 1):
            if isinstance(digest, OSError):
                findings.unreadable.append(f"{name}: {digest.strerror or digest}")
            elif digest != expected[name]:
                findings.changed.append(name)
            if progress is not None and (done % 100 == 0 or done == len(present)):
                progress("files", done, len(present), "files")
    return findings


def _expected(root: Root, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """File and SHA-256 of everything but the manifest itself."""
    table = read_samples(root, manifest)
    files, labels = table["file"].to_pylist(), table["label"].to_pylist()
    counts = {"train": [0] * len(manifest.classes), "val": [0] * len(manifest.classes)}
    for file, label in zip(files, labels, strict=True):
        counts[file.partition("/")[0]][label] += 1
    for part, numbers in counts.items():
        promised = [entry[part] for entry in manifest.classes]
        if promised != numbers or manifest.counts[part] != sum(numbers):
            raise UserError(
                f"data {root}: {MANIFEST} has {manifest.counts[part]} images in {part}, "
                f"{SAMPLES} has {sum(numbers)}, or other classes; prepare the set again"
            )
    if manifest.layout == "folder":
        yield from zip(files, table["sha256"].to_pylist(), strict=True)
        return
    for shard in manifest.shards:
        yield shard["file"], shard["sha256"]
        yield Path(shard["file"]).with_suffix(".idx").name, shard["index_sha256"]


def _files(root: Root) -> Iterator[str]:
    if isinstance(root, ObjectFolder):
        yield from (key for key in patiently(root.objects) if not key.startswith(f"{WORK}/"))
        return
    for folder, folders, names in os.walk(root):
        if Path(folder) == root and WORK in folders:
            folders.remove(WORK)  # left by a kill after the very last step
        for name in names:
            yield (Path(folder) / name).relative_to(root).as_posix()


def _digest(root: Root, name: str) -> str | OSError:
    try:
        if isinstance(root, Path):
            return sha256(root / name)
        return _digest_of_object(root, name)
    except OSError as error:
        return error


def _digest_of_object(root: ObjectFolder, name: str) -> str:
    found = hashlib.sha256()
    with root.opened(name) as file:
        for offset in range(0, file.size, _CHUNK_BYTES):
            found.update(patiently(partial(file.read, offset, _CHUNK_BYTES)))
    return found.hexdigest()
