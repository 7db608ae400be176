"""From archives to a prepared set: in parallel, restartable, and the same however often cut."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.inspection import inspect_bytes
from pipelines.sources import cifar, imagenet, tiny_imagenet
from pipelines.sources.archives import Archive, Progress, locate, md5_of, verify
from pipelines.sources.catalogue import PARTS, Catalogue
from pipelines.sources.manifest import (
    CLASSES,
    LAYOUTS,
    WORK,
    Manifest,
    is_prepared,
    read_manifest,
    write_file,
    write_samples,
)
from pipelines.sources.shards import shuffled_runs, write_shard
from sbf_dist.errors import UserError

_UNIT = 500  # images of a unit of work in the layout "folder"
_REPORT = 50  # images between two reports


def prepare(
    name: str,
    archives: Path,
    out: Path,
    *,
    layout: str = "folder",
    seed: int = 0,
    checksum: bool = True,
    progress: Progress | None = None,
) -> Manifest:
    """Turn the archives of a set (see manifest.CLASSES) in the folder `archives` into `out`.

    layout     "folder": out/train/CLASS/* and out/val/CLASS/*; "webdataset": tar files
               out/train-000000.tar … with an index each, the samples of a part shuffled by `seed`
    checksum   whether the archives must have their published MD5 sums
    progress   called with (title, done, of, unit)

    Work is done in out/.preparing, unit by unit, and what a unit made is noted when it is whole:
    after a kill the same call goes on, and the result is the same. The last step is manifest.json.
    A set that is there already is left as it is. UserError for archives that are missing, damaged
    or others than the published ones, for a folder that holds anything else, for settings other
    than those of the work that is to go on, and for a full or read-only disk.
    """
    assert name in CLASSES and layout in LAYOUTS, f"{name}, {layout}"
    out = Path(out).expanduser().absolute()
    done = _done_before(name, out, layout, seed)
    if done is not None:
        return done
    found = [locate(archives, alternatives) for alternatives in _ARCHIVES[name]]
    with _writing(out):
        (out / WORK).mkdir(parents=True, exist_ok=True)
        with _locked(out / WORK / "lock"):
            records = [_checked(out, it, checksum, progress) for it in found]
            settings = {"set": name, "layout": layout, "seed": seed, "archives": records}
            _check_settings(out, settings)
            with _catalogue(name, [path for _, path in found], progress) as catalogue:
                work = _Work(out, layout, catalogue, _units(layout, catalogue, seed), progress)
                work.perform()
                return _finish(work, settings)


_ARCHIVES: dict[str, list[tuple[Archive, ...]]] = {
    "cifar10": [cifar.ARCHIVES["cifar10"]],
    "cifar100": [cifar.ARCHIVES["cifar100"]],
    "tiny-imagenet": [(tiny_imagenet.ARCHIVE,)],
    "imagenet": [(imagenet.TRAIN,), (imagenet.VALIDATION,), (imagenet.DEVKIT,)],
}


@contextmanager
def _catalogue(name: str, paths: list[Path], progress: Progress | None) -> Iterator[Catalogue]:
    match name:
        case "imagenet":
            train, validation, devkit = paths
            with imagenet.catalogue(train, validation, devkit, progress) as catalogue:
                yield catalogue
        case "tiny-imagenet":
            with tiny_imagenet.catalogue(*paths) as catalogue:
                yield catalogue
        case _:
            yield cifar.catalogue(*paths)


# --- before the work -----------------------------------------------------------------------------


def _done_before(name: str, out: Path, layout: str, seed: int) -> Manifest | None:
    """The manifest of a set that is prepared already; UserError if `out` is of no use."""
    if out.exists() and not out.is_dir():
        raise UserError(f"data {out}: is a file; choose a new folder")
    if is_prepared(out):
        manifest = read_manifest(out)
        wanted = {"set": name, "layout": layout}
        if layout == "webdataset":
            wanted["seed"] = str(seed)
        for key, value in wanted.items():
            if str(getattr(manifest, key)) != value:
                raise UserError(
                    f"data {out}: holds {manifest.set} as {manifest.layout} (seed "
                    f"{manifest.seed}) already; choose a new folder"
                )
        return manifest
    if out.is_dir() and not (out / WORK).is_dir() and any(out.iterdir()):
        raise UserError(
            f"data {out}: holds other files ({min(p.name for p in out.iterdir())}); choose a new "
            "folder"
        )
    return None


def _checked(
    out: Path, found: tuple[Archive, Path], checksum: bool, progress: Progress | None
) -> dict[str, Any]:
    """Name, bytes and MD5 of an archive; the sum of a file that did not change is kept."""
    archive, path = found
    facts = path.stat()
    note = out / WORK / f"{archive.name}.json"
    seen = [facts.st_size, facts.st_mtime_ns, facts.st_ino]
    kept = json.loads(note.read_text()) if note.exists() else {}
    md5 = kept["md5"] if kept.get("seen") == seen else md5_of(path, progress)
    if checksum:
        verify(archive, path, md5)
    write_file(note, json.dumps({"seen": seen, "md5": md5}).encode())
    return {
        "file": archive.name,
        "bytes": facts.st_size,
        "md5": md5,
        "published": md5 == archive.md5,
    }


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    path = out / WORK / "settings.json"
    if not path.exists():
        write_file(path, json.dumps(settings).encode())
        return
    begun = json.loads(path.read_text())
    for key, value in settings.items():
        if begun[key] != value:
            told = "" if key == "archives" else f" {begun[key]}, not {value}"
            raise UserError(
                f"data {out}: was begun with other {key}{told}; choose another folder, or remove "
                f"{out / WORK} to begin anew"
            )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a set's folder for this process; the lock goes with the process, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"data {path.parent.parent}: is being prepared by another process; wait for it"
            ) from None
        yield


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Tell in one line what kept files from being written."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full; free some space and give the same command: it goes on",
            errno.EDQUOT: "the quota is used up; free some space and give the same command: it "
            "goes on",
            errno.EFBIG: "a file may not grow further (ulimit -f); the same command goes on",
            errno.EROFS: "is on a read-only disk; choose another folder",
            errno.EACCES: "may not be written to; choose another folder",
            errno.EPERM: "may not be written to; choose another folder",
        }
        reason = reasons.get(error.errno or 0, f"cannot be written ({error.strerror or error})")
        raise UserError(f"data {out}: {reason}") from error


# --- the work ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """What is done in one go: some images, of one shard or of none."""

    name: str
    rows: NDArray[np.int64]
    shard: str | None = None


def _units(layout: str, catalogue: Catalogue, seed: int) -> list[_Unit]:
    rows = np.arange(len(catalogue))
    if layout == "folder":
        return [
            _Unit(f"{start:08}", rows[start : start + _UNIT])
            for start in range(0, len(catalogue), _UNIT)
        ]
    in_train = np.array([file.startswith("train/") for file in catalogue.files])
    return [
        _Unit(f"{part}-{number:06}", run, f"{part}-{number:06}.tar")
        for part, those in (("train", rows[in_train]), ("val", rows[~in_train]))
        for number, run in enumerate(shuffled_runs(catalogue.sizes, those, seed=seed))
    ]


class _Work:
    """The units of a preparation and what is known of the images that are done.

    A unit's note in .preparing/notes is written after its files: image by image bytes, digest,
    height, width, fault and offset, and the shard's record where there is one.
    """

    def __init__(
        self,
        out: Path,
        layout: str,
        catalogue: Catalogue,
        units: list[_Unit],
        progress: Progress | None,
    ) -> None:
        self.out, self.layout, self.catalogue, self.units = out, layout, catalogue, units
        self.notes: dict[str, dict[str, Any]] = {}
        self._progress = progress
        self._made = out / WORK / "made"
        self._done = 0
        self._stopped = False

    def perform(self) -> None:
        """Do the units that are not done."""
        (self.out / WORK / "notes").mkdir(exist_ok=True)
        self._made.mkdir(exist_ok=True)
        open_units = [unit for unit in self.units if not self._is_done(unit)]
        self._check_space(open_units)
        for folder in {Path(file).parent for file in self.catalogue.files}:
            if self.layout == "folder" and open_units:
                (self._made / folder).mkdir(parents=True, exist_ok=True)
        self._done = sum(len(note["images"]) for note in self.notes.values())
        # Two threads a processor: reading, hashing and writing all let go of the interpreter.
        with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:
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

    def _is_done(self, unit: _Unit) -> bool:
        """Whether a unit's note and all its files are there; takes up the note."""
        try:
            note = json.loads(self._note(unit).read_text())
        except FileNotFoundError:
            return False
        if unit.shard is None:
            names = [self.catalogue.files[row] for row in unit.rows]
            sizes = [image[0] for image in note["images"]]
        else:
            names, sizes = [unit.shard], [note["shard"]["bytes"]]
        whole = all(self._size(name) == size for name, size in zip(names, sizes, strict=True))
        if whole:
            self.notes[unit.name] = note
        return whole

    def _size(self, name: str) -> int | None:
        # The last step moves files out of the work folder; it too may have been cut.
        for folder in (self._made, self.out):
            try:
                return (folder / name).stat().st_size
            except FileNotFoundError:
                continue
        return None

    def _check_space(self, units: list[_Unit]) -> None:
        needed = sum(int(self.catalogue.sizes[unit.rows].sum()) for unit in units)
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise UserError(
                f"data {self.out}: needs {needed / 1e9:.1f} GB more, the disk has "
                f"{free / 1e9:.1f} GB free; choose a folder on another disk"
            )

    def _perform(self, unit: _Unit) -> None:
        """Write the files of a unit, then its note."""
        images: list[list[Any]] = []
        record = None
        if unit.shard is None:
            for name, _, data in self._samples(unit, images):
                (self._made / name).write_bytes(data)
        else:
            path = self._made / unit.shard
            partial = path.with_name(f".{path.name}")
            shard = write_shard(partial, self._samples(unit, images))
            for image, offset in zip(images, shard.offsets, strict=True):
                image.append(offset)
            write_file(path.with_suffix(".idx"), shard.index.encode())
            partial.replace(path)
            record = {
                "file": path.name,
                "bytes": shard.bytes,
                "sha256": shard.sha256,
                "index_sha256": hashlib.sha256(shard.index.encode()).hexdigest(),
                "samples": len(unit.rows),
            }
        note = {"images": images, "shard": record}
        write_file(self._note(unit), json.dumps(note).encode())
        self.notes[unit.name] = note

    def _samples(self, unit: _Unit, images: list[list[Any]]) -> Iterator[tuple[str, int, bytes]]:
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
                self._done % _REPORT == 0 or self._done == len(self.catalogue)
            ):
                self._progress("images", self._done, len(self.catalogue), "images")

    def _note(self, unit: _Unit) -> Path:
        return self.out / WORK / "notes" / f"{unit.name}.json"

    def move(self) -> None:
        """Move what was made to its place; what was moved before is left there."""
        for path in sorted(self._made.iterdir()):
            path.replace(self.out / path.name)


# --- after the work ------------------------------------------------------------------------------


def _finish(work: _Work, settings: dict[str, Any]) -> Manifest:
    os.sync()  # not file by file: that would take longer than all the rest
    work.move()
    columns = _columns(work)
    samples = write_samples(work.out, columns)
    classes = list(work.catalogue.classes.items())
    part = np.array([PARTS.index(file.partition("/")[0]) for file in columns["file"]])
    counts = np.zeros((len(PARTS), len(classes)), dtype=np.int64)
    np.add.at(counts, (part, columns["label"]), 1)
    manifest = Manifest(
        **settings,
        classes=[
            {"folder": folder, "name": name}
            | {PARTS[p]: int(counts[p, label]) for p in range(len(PARTS))}
            for label, (folder, name) in enumerate(classes)
        ],
        counts={PARTS[p]: int(counts[p].sum()) for p in range(len(PARTS))},
        content=_content_digest(columns),
        samples=samples,
        shards=[it for unit in work.units if (it := work.notes[unit.name]["shard"]) is not None],
    )
    manifest.write(work.out)
    shutil.rmtree(work.out / WORK)
    return manifest


def _columns(work: _Work) -> dict[str, Any]:
    """The columns of samples.parquet, sorted by file."""
    rows = np.concatenate([unit.rows for unit in work.units])
    images = [it for unit in work.units for it in work.notes[unit.name]["images"]]
    shards = np.concatenate(
        [np.full(len(u.rows), -1 if u.shard is None else k) for k, u in enumerate(work.units)]
    )
    files = [work.catalogue.files[row] for row in rows]
    order = sorted(range(len(files)), key=files.__getitem__)
    fields = {
        name: [images[i][k] for i in order]
        for k, name in enumerate(("bytes", "sha256", "height", "width", "fault"))
    }
    return {
        "file": [files[i] for i in order],
        "label": work.catalogue.labels[rows[order]],
        **fields,
        "shard": shards[order],
        "offset": [images[i][5] if len(images[i]) > 5 else 0 for i in order],
    }


def _content_digest(columns: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for file, sha256 in zip(columns["file"], columns["sha256"], strict=True):
        digest.update(f"{file}\0{sha256}\n".encode())
    return digest.hexdigest()
