"""Whether a prepared set is still what its manifest says."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

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


def check(root: Path, progress: Progress | None = None) -> Findings:
    """Compare every file with its SHA-256, and the folder with the list of files.

    `progress` is called with (title, done, of, unit). UserError if there is no manifest, or if
    manifest.json and samples.parquet contradict each other.
    """
    root = Path(root).expanduser().absolute()
    manifest = read_manifest(root)
    expected = dict(_expected(root, manifest))
    found = set(_files(root))
    findings = Findings(
        files=len(expected),
        missing=sorted(expected.keys() - found),
        superfluous=sorted(found - expected.keys() - {MANIFEST, SAMPLES}),
    )
    present = sorted(expected.keys() & found)
    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:
        digests = pool.map(lambda name: _digest(root / name), present)
        for done, (name, digest) in enumerate(zip(present, digests, strict=True), 1):
            if isinstance(digest, OSError):
                findings.unreadable.append(f"{name}: {digest.strerror}")
            elif digest != expected[name]:
                findings.changed.append(name)
            if progress is not None and (done % 100 == 0 or done == len(present)):
                progress("files", done, len(present), "files")
    return findings


def _expected(root: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
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


def _files(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        if Path(folder) == root and WORK in folders:
            folders.remove(WORK)  # left by a kill after the very last step
        for name in names:
            yield (Path(folder) / name).relative_to(root).as_posix()


def _digest(path: Path) -> str | OSError:
    try:
        return sha256(path)
    except OSError as error:
        return error
