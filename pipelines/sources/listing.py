"""Which images a place holds: class folders, a folder without classes, or a prepared set."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.index import UNKNOWN, Contents
from pipelines.inspection import SUFFIXES, Inspection
from pipelines.roots import Root, way
from pipelines.sources.manifest import (
    CLASSES,
    WORK,
    Manifest,
    is_prepared,
    read_manifest,
    read_samples,
)
from sbf_dist.errors import UserError
from sbf_dist.object_storage import ObjectFolder
from sbf_dist.patience import patiently

_log = logging.getLogger(__name__)

_MAX_NAMED = 3  # of what else lies at an address

# What a folder beside others says, in any case, of the images in it.
ROLES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "unlabelled": "unlabelled",
    "unlabeled": "unlabelled",
    "test": "test",
    "testing": "test",
}
# Images that are not read: counted, lest they be missed.
UNREAD = (".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".tga", ".psd", ".dng", ".exr")


@dataclass
class Listing:
    """The images of one place, sorted by name.

    files    relative to the root of the index, as it has them
    roles    "train", "val" or "unlabelled"
    labels   int64 (n,): positions in `classes`, −1 for an unlabelled image
    seen     what is known of each image's content; None where it was not read yet
    shards   tar files relative to the root of the index
    shard    int64 (n,): position in `shards`, −1 for a file of its own; offset: as in DataIndex
    contents digests of shards and images, of a set in an object store; None for one on a disk
    digests  uint8 (n, 32): SHA-256 of each image of a prepared set, zeros where it was not read yet
    """

    classes: list[str]
    files: list[str]
    roles: list[str]
    labels: NDArray[np.int64]
    seen: Sequence[Inspection | None]
    shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    shards: list[str] = field(default_factory=list)
    contents: Contents | None = None
    digests: NDArray[np.uint8] | None = None

    @classmethod
    def of_files(
        cls, classes: list[str], files: list[str], roles: list[str], labels: Sequence[int]
    ) -> "Listing":
        """Files whose content was not read yet."""
        return cls(
            classes=classes,
            files=files,
            roles=roles,
            labels=np.array(labels, dtype=np.int64),
            seen=[None] * len(files),
            shard=np.full(len(files), -1),
            offset=np.zeros(len(files), dtype=np.int64),
        )

    def take(self, rows: Sequence[int]) -> "Listing":
        """Some of the images, in the order of `rows`."""
        return Listing(
            classes=self.classes,
            files=[self.files[row] for row in rows],
            roles=[self.roles[row] for row in rows],
            labels=self.labels[rows],
            seen=[self.seen[row] for row in rows],
            shard=self.shard[rows],
            offset=self.offset[rows],
            shards=self.shards,
            contents=None if self.contents is None else self.contents.take(rows),
            digests=None if self.digests is None else self.digests[rows],
        )

    def known_digests(self) -> NDArray[np.uint8]:
        """The digests, zeros where there are none."""
        return np.zeros((len(self.files), 32), np.uint8) if self.digests is None else self.digests


def list_images(root: Root, expected: str | None = None) -> Listing:
    """The images of a prepared set or of class folders (index_folder says which layouts).

    `expected` is a set of manifest.CLASSES that it must be: by its manifest, where it has one, and
    by the number of its classes. No image is read. UserError for mistakes of layout; in an object
    store, for anything but the shards of a prepared set.
    """
    if isinstance(root, ObjectFolder):
        _check_prepared(root)
    elif not root.is_dir():
        raise UserError(f"data {root}: is not a folder")
    if isinstance(root, ObjectFolder) or is_prepared(root):
        name = read_manifest(root).set
        if expected is not None and name != expected:
            raise UserError(f"data {root}: holds {name}, not {expected}")
        listing = _prepared(root)
    else:
        listing = _class_folders(root)
    if expected is not None and len(listing.classes) != CLASSES[expected]:
        raise UserError(
            f"data {root}: has {len(listing.classes)} classes, {expected} has {CLASSES[expected]}; "
            "use source: folder for a part of it"
        )
    return listing


def list_unlabelled(folder: Root, root: Root) -> Listing:
    """All images below `folder`, or the training images of a prepared set, without classes.

    Their names are relative to `root`, so "../" stands in front where they lie elsewhere. UserError
    if there is no image, or if only one of the two is in an object store.
    """
    if isinstance(folder, Path) and not folder.is_dir():
        raise UserError(f"data.unlabelled {folder}: is not a folder")
    there = PurePosixPath(way(root, folder))
    if isinstance(folder, ObjectFolder):
        _check_prepared(folder)
    if isinstance(folder, ObjectFolder) or is_prepared(folder):
        listing = _prepared(folder)
        listing = listing.take([row for row, role in enumerate(listing.roles) if role == "train"])
    else:
        files = sorted(_images(folder, folder))
        listing = Listing.of_files([], files, ["unlabelled"] * len(files), [UNKNOWN] * len(files))
    if not listing.files:
        raise UserError(f"data.unlabelled {folder}: has no image ({' '.join(SUFFIXES)})")
    listing.classes = []
    listing.files = [(there / name).as_posix() for name in listing.files]
    listing.shards = [(there / name).as_posix() for name in listing.shards]
    listing.roles = ["unlabelled"] * len(listing.files)
    listing.labels = np.full(len(listing.files), UNKNOWN, dtype=np.int64)
    return listing


def joined(listing: Listing, others: Listing, root: Root) -> Listing:
    """Both listings as one, with the classes of the first; UserError if they share an image."""
    files = [*listing.files, *others.files]
    if len(set(files)) < len(files):
        raise UserError(f"data {root}: its unlabelled images are among the labelled ones")
    moved = np.where(others.shard < 0, -1, others.shard + len(listing.shards))
    together = Listing(
        classes=listing.classes,
        files=files,
        roles=listing.roles + others.roles,
        labels=np.concatenate([listing.labels, others.labels]),
        seen=[*listing.seen, *others.seen],
        shard=np.concatenate([listing.shard, moved]),
        offset=np.concatenate([listing.offset, others.offset]),
        shards=listing.shards + others.shards,
        contents=Contents.joined(listing.contents, others.contents),
        digests=np.concatenate([listing.known_digests(), others.known_digests()]),
    )
    return together.take(sorted(range(len(files)), key=files.__getitem__))


def _check_prepared(root: ObjectFolder) -> None:
    """UserError for what is not the shards of a prepared set: nothing else is read in a store."""
    remedy = "sbf data prepare --format webdataset --out ADDRESS writes what is read there"
    if is_prepared(root):
        if read_manifest(root).layout != "webdataset":
            raise UserError(f"data {root}: holds its images as single files; {remedy}")
        return
    names = patiently(root.names)  # UserError where the bucket does not exist
    if WORK in names:
        raise UserError(f"data {root}: has no set in shards; its preparation is not finished")
    state = f"has {', '.join(names[:_MAX_NAMED])} but no set in shards" if names else "is empty"
    raise UserError(f"data {root}: {state}; {remedy}")


def _check_shards(root: Root, manifest: Manifest) -> None:
    """UserError for a shard that is missing or, in a store, has another size."""
    found = patiently(root.objects) if isinstance(root, ObjectFolder) else None
    for shard in manifest.shards:
        name = shard["file"]
        if found is None:
            missing = not (root / name).is_file()
        else:
            missing = name not in found
            if not missing and found[name].size != shard["bytes"]:
                raise UserError(
                    f"data {root}: {name} has {found[name].size:,} bytes, had {shard['bytes']:,} "
                    "when it was prepared; sbf data check shows what else has changed"
                )
        if missing:
            raise UserError(f"data {root}: {name} is missing; sbf data check shows what else is")


def _contents(manifest: Manifest, digests: NDArray[np.uint8]) -> Contents:
    return Contents(
        shard_bytes=[int(shard["bytes"]) for shard in manifest.shards],
        shard_digests=[shard["sha256"] for shard in manifest.shards],
        images=digests,
    )


def _as_bytes(digests: pa.ChunkedArray) -> NDArray[np.uint8]:
    """Hexadecimal digests as an array, uint8 (n, 32); zeros where there is none."""
    text = "".join(digest or "0" * 64 for digest in digests.to_pylist())
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 32)


def _prepared(root: Root) -> Listing:
    """The images that a manifest lists."""
    manifest = read_manifest(root)
    table = read_samples(root, manifest)
    columns = {name: table[name].to_pylist() for name in ("height", "width", "bytes", "fault")}
    files = table["file"].to_pylist()
    _check_shards(root, manifest)
    digests = _as_bytes(table["sha256"])
    return Listing(
        classes=[entry["folder"] for entry in manifest.classes],
        files=files,
        roles=[file.partition("/")[0] for file in files],
        labels=table["label"].to_numpy().astype(np.int64),
        seen=[Inspection(*it) for it in zip(*columns.values(), strict=True)],
        shard=table["shard"].to_numpy().astype(np.int64),
        offset=table["offset"].to_numpy().astype(np.int64),
        shards=[shard["file"] for shard in manifest.shards],
        contents=_contents(manifest, digests) if isinstance(root, ObjectFolder) else None,
        digests=digests,
    )


def _class_folders(root: Path) -> Listing:
    """Every candidate of root/<class> or root/train/<class>, root/val and root/unlabelled."""
    if not any(root.iterdir()):
        raise UserError(f"data {root}: is empty; it should hold one folder a class")
    folders = _split_folders(root)
    split = "train" in folders
    if not split:
        for role in folders:
            raise UserError(f"data {root}: has a folder {role} but no folder train")
    train = folders.get("train", root)
    classes = _folders(train)
    if not classes:
        raise UserError(f"data {train}: has no class folders; expected {train}/<class>/<image>")
    for name in classes:
        _check_class(train, name)
    label_of = {name: label for label, name in enumerate(classes)}
    found = [(name, "train", label_of[c]) for c in classes for name in _images(root, train / c)]
    if split and "val" in folders:
        val = folders["val"]
        for name in _folders(val):
            if name not in label_of:
                raise UserError(
                    f"data {root}: {val.name} has the class {name!r}, which {train.name} does "
                    "not have"
                )
            label = label_of[name]
            found += [(file, "val", label) for file in _images(root, val / name)]
        if not any(role == "val" for _, role, _ in found):
            raise UserError(f"data {val}: has no image; expected {val.name}/<class>/<image>")
    if split and "unlabelled" in folders:
        hidden = list(_images(root, folders["unlabelled"]))
        if not hidden:
            raise UserError(
                f"data {folders['unlabelled']}: has no image ({' '.join(SUFFIXES)}); add some, or "
                "remove the folder"
            )
        found += [(name, "unlabelled", UNKNOWN) for name in hidden]
    found.sort()
    return Listing.of_files(
        classes,
        [name for name, _, _ in found],
        [role for _, role, _ in found],
        [label for _, _, label in found],
    )


def _check_class(folder: Path, name: str) -> None:
    """UserError for a class whose name no file can keep, or whose folder holds all the others."""
    if not name.isprintable():  # among them: bytes that are no UTF-8
        raise UserError(
            f"data {folder}: the class {name!a} has unprintable characters in its name, or bytes "
            "that are not UTF-8; rename its folder"
        )
    place = (folder / name).resolve()
    if folder.resolve().is_relative_to(place):
        raise UserError(
            f"data {folder}: the class {name!r} is a link to {place}, which holds the other "
            "classes; remove the link"
        )


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of `root` that hold a part of the images, by role; none if these are classes.

    Names in lower case that say "train", "val" or "unlabelled" always do. Others, "Train" or
    "valid", may be a class's: they count beside a folder for training that holds class folders, if
    no other folder is there. What such a set has beyond these roles is named in the log.
    """
    names = _folders(root)
    by_role: dict[str, list[str]] = {}
    for name in names:
        by_role.setdefault(ROLES.get(name.lower(), ""), []).append(name)
    exact = [name for name in names if name in ("train", "val", "unlabelled")]
    alike = not by_role.get("") and any(_folders(root / n) for n in by_role.get("train", ()))
    if "train" not in names and not alike:
        return {name: root / name for name in exact}
    for role, several in by_role.items():
        if role in ("train", "val", "unlabelled") and len(several) > 1:
            raise UserError(
                f"data {root}: has folders {' and '.join(several)}, which both say {role}: keep one"
            )
    unused = [*by_role.get("", ()), *by_role.get("test", ())]
    if unused:
        _log.warning(
            "%s: not used, as it is neither train, val nor unlabelled: %s", root, ", ".join(unused)
        )
    return {
        role: root / by_role[role][0] for role in ("train", "val", "unlabelled") if role in by_role
    }


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(root: Path, top: Path) -> Iterator[str]:
    unread: Counter[str] = Counter()
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES):
                yield (Path(folder) / name).relative_to(root).as_posix()
            elif name.lower().endswith(UNREAD):
                unread[Path(name).suffix.lower()] += 1
    if unread:
        counts = ", ".join(f"{number} {suffix}" for suffix, number in sorted(unread.items()))
        _log.warning("%s: skipped %s, which cannot be read", top, counts)
