"""From archives to a prepared set: in parallel, restartable, and the same however often cut."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.roots import Root, root_of
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
    write_samples,
)
from pipelines.sources.units import Work, units
from pipelines.sources.uploading import Upload
from sbf_dist.errors import UserError
from sbf_dist.files import cache_folder, read_json, write_text
from sbf_dist.object_storage import ObjectFolder
from sbf_dist.patience import patiently


def prepare(
    name: str,
    archives: Path,
    out: Path | str,
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

    Work is done in out/.preparing, unit by unit, and a unit's files are noted when they are whole:
    after a kill the same call goes on, and the result is the same. The last step is manifest.json.
    A set that is there already is left as it is. UserError for archives that are missing, damaged
    or others than the published ones, for a folder that holds anything else, for settings other
    than those of the work that is to go on, and for a full or read-only disk.

    `out` may be the address of a folder in an object store, for shards. They are written in this
    machine's folder for caches and go there one by one; UserError where another layout is wanted,
    RunError where the store does not answer for minutes.
    """
    assert name in CLASSES and layout in LAYOUTS, f"{name}, {layout}"
    root = root_of(out)
    if isinstance(root, ObjectFolder) and layout != "webdataset":
        raise UserError(
            f"data {root}: in an object store images are kept in shards only; give --format "
            "webdataset"
        )
    done = _done_before(name, root, layout, seed)
    if done is not None:
        return done
    found = [locate(archives, alternatives) for alternatives in _ARCHIVES[name]]
    upload = Upload(root) if isinstance(root, ObjectFolder) else None
    here = _scratch(root) if isinstance(root, ObjectFolder) else root
    with _writing(here):
        (here / WORK).mkdir(parents=True, exist_ok=True)
        with _locked(here / WORK / "lock", root):
            records = [_checked(here, it, checksum, progress) for it in found]
            settings = {"set": name, "layout": layout, "seed": seed, "archives": records}
            if upload is None:
                _check_settings(here, settings)
            else:
                upload.begin(settings)
            with _catalogue(name, [path for _, path in found], progress) as catalogue:
                todo = units(layout, catalogue, seed)
                work = Work(here, layout, catalogue, todo, progress, upload)
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


def _scratch(root: ObjectFolder) -> Path:
    """The folder of this machine in which shards for an address are written."""
    digest = hashlib.sha256(root.address.encode()).hexdigest()
    return cache_folder() / "preparing" / digest[:16]


def _done_before(name: str, out: Root, layout: str, seed: int) -> Manifest | None:
    """The manifest of a set that is prepared already; UserError if `out` is of no use."""
    if isinstance(out, Path) and out.exists() and not out.is_dir():
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
        # Where the very last step was cut:
        if isinstance(out, ObjectFolder):
            Upload(out).clean()
        else:
            shutil.rmtree(out / WORK, ignore_errors=True)
        return manifest
    names = _names(out)
    if names and WORK not in names:
        raise UserError(f"data {out}: holds other files ({names[0]}); choose a new folder")
    return None


def _names(out: Root) -> list[str]:
    if isinstance(out, ObjectFolder):
        return patiently(out.names)
    return sorted(path.name for path in out.iterdir()) if out.is_dir() else []


def _checked(
    out: Path, found: tuple[Archive, Path], checksum: bool, progress: Progress | None
) -> dict[str, Any]:
    """Name, bytes and MD5 of an archive; the sum of a file that did not change is kept."""
    archive, path = found
    facts = path.stat()
    note = out / WORK / f"{archive.name}.json"
    seen = [facts.st_size, facts.st_mtime_ns, facts.st_ino]
    try:
        kept = read_json(note) if note.exists() else {}
    except UserError:  # a sum that is read again
        kept = {}
    md5 = kept["md5"] if kept.get("seen") == seen else md5_of(path, progress)
    if checksum:
        verify(archive, path, md5)
    write_text(note, json.dumps({"seen": seen, "md5": md5}))
    return {
        "file": archive.name,
        "bytes": facts.st_size,
        "md5": md5,
        "published": md5 == archive.md5,
    }


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    path = out / WORK / "settings.json"
    if not path.exists():
        write_text(path, json.dumps(settings))
        return
    begun = read_json(path, f"remove {out / WORK} to start again")
    for key, value in settings.items():
        if begun.get(key) != value:
            values = "" if key == "archives" else f" {begun.get(key)}, not {value}"
            raise UserError(
                f"data {out}: was begun with other {key}{values}; choose another folder, or remove "
                f"{out / WORK} to start again"
            )


@contextmanager
def _locked(path: Path, out: Root) -> Iterator[None]:
    """Hold a set's folder for this process; the lock goes with the process, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"data {out}: is being prepared by another process; wait for it"
            ) from None
        yield


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turn an error of writing into a UserError with the remedy."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full; free some space and run the same command again",
            errno.EDQUOT: "the quota is used up; free some space and run the same command again",
            errno.EFBIG: "the limit on file sizes is reached (ulimit -f); raise it and run the "
            "same command again",
            errno.EROFS: "is on a read-only disk; choose another folder",
            errno.EACCES: "is not writable; choose another folder",
            errno.EPERM: "is not writable; choose another folder",
        }
        reason = reasons.get(error.errno or 0, f"cannot be written ({error.strerror or error})")
        raise UserError(f"data {out}: {reason}") from error


# --- after the work ------------------------------------------------------------------------------


def _finish(work: Work, settings: dict[str, Any]) -> Manifest:
    os.sync()  # not file by file: that would take longer than all the rest
    work.move()
    table = work.samples()
    counts = _counts(table, len(work.catalogue.classes))
    manifest = Manifest(
        **settings,
        classes=[
            {"folder": folder, "name": name, **{part: int(counts[part][label]) for part in PARTS}}
            for label, (folder, name) in enumerate(work.catalogue.classes.items())
        ],
        counts={part: int(counts[part].sum()) for part in PARTS},
        content=_content_digest(table),
        samples=write_samples(work.out, table),
        shards=work.shards(),
    )
    manifest.write(work.out)
    if work.upload is not None:
        work.upload.finish(work.out)
        shutil.rmtree(work.out)
        return manifest
    for left in work.out.glob(".*.partial"):  # by a kill
        left.unlink()
    shutil.rmtree(work.out / WORK)
    return manifest


def _counts(table: pa.Table, classes: int) -> dict[str, NDArray[np.int64]]:
    """Images of each class, part by part."""
    labels = table["label"].to_numpy()
    return {
        part: np.bincount(
            labels[pc.starts_with(table["file"], f"{part}/").to_numpy()], minlength=classes
        )
        for part in PARTS
    }


def _content_digest(table: pa.Table) -> str:
    digest = hashlib.sha256()
    for batch in table.select(["file", "sha256"]).to_batches(max_chunksize=10_000):
        for file, sha256 in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            digest.update(f"{file}\0{sha256}\n".encode())
    return digest.hexdigest()
