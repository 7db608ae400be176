"""A folder of images, one folder a class, as a data index."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.index import UNKNOWN, DataIndex
from pipelines.inspection import SUFFIXES, Inspection, inspect_all
from sbf_dist.errors import UserError

_log = logging.getLogger(__name__)

_TOLERATED = 0.01  # the share of unusable files that is skipped rather than refused
_NAMED = 3  # so many files are named in an error


def index_folder(
    root: Path,
    *,
    labelled_per_class: int | None,
    validation: int | float | None,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> DataIndex:
    """Index the images below `root`, reading every file once.

    Layouts:
        root/<class>/**            images in any depth below the class
        root/train/<class>/**      with optional root/val/<class>/** and, without classes,
                                   root/unlabelled/**
    Images are known by their suffix (jpg jpeg png bmp webp tif tiff ppm pgm, in any case); names
    that begin with a dot are passed over, links to folders are followed only for classes.

    labelled_per_class   keep so many random images of each class as the part "labelled", the rest
                         of train becomes "unlabelled"; a smaller number picks a subset of what a
                         larger one picks. None: all are labelled.
    validation           where there is no val folder: how many images (int) or which share of them
                         (float in (0, 1)) is taken from train, in proportion to the classes. Where
                         there is one, it is used, and this is ignored.
    progress             called with (files read, files in all)

    Files that cannot be decoded are skipped, logged and listed in `skipped`; more than 1 % of them
    is an error. UserError for every mistake of layout or number, telling the class and the count.
    """
    root = Path(root).expanduser().absolute()
    classes, found = _find(root)
    found, inspected, skipped = _usable(root, found, progress)
    files = [name for name, _, _ in found]
    labels = np.array([label for _, _, label in found], dtype=np.int64)
    roles = np.array([role for _, role, _ in found])
    index = DataIndex(
        root=root,
        classes=classes,
        files=files,
        labels=labels,
        sizes=np.array([(it.height, it.width) for it in inspected], dtype=np.int64),
        file_bytes=np.array([it.bytes for it in inspected], dtype=np.int64),
        parts=_parts(
            root,
            classes,
            labels,
            roles,
            labelled_per_class=labelled_per_class,
            validation=validation,
            seed=seed,
        ),
        skipped=skipped,
    )
    _log.info(
        "%s: %d classes, %s, %d skipped",
        root,
        len(classes),
        ", ".join(f"{len(ids)} {part}" for part, ids in index.parts.items()),
        len(skipped),
    )
    return index


def check_folder(
    root: Path, *, labelled_per_class: int | None, validation: int | float | None, seed: int
) -> None:
    """Raise what index_folder would raise before it reads an image: mistakes of layout and number.

    Files that cannot be decoded are only found by reading them, so index_folder may still raise.
    """
    root = Path(root).expanduser().absolute()
    classes, found = _find(root)
    _parts(
        root,
        classes,
        np.array([label for _, _, label in found], dtype=np.int64),
        np.array([role for _, role, _ in found]),
        labelled_per_class=labelled_per_class,
        validation=validation,
        seed=seed,
    )


def share_out(counts: NDArray[np.int64], take: int, caps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Split `take` over groups in proportion to their counts, by largest remainder.

    No group gives more than its cap; the caps must add up to `take` at least. Ties go to the first.
    """
    assert take <= caps.sum(), f"{take} of {caps.sum()}"
    quota = take * counts / counts.sum()
    shares = np.minimum(np.floor(quota).astype(np.int64), caps)
    while shares.sum() < take:
        lag = np.where(shares < caps, quota - shares, -np.inf)
        shares[np.argmax(lag)] += 1
    return shares


def _find(root: Path) -> tuple[list[str], list[tuple[str, str, int]]]:
    """The classes, and (relative name, role, label) of every candidate, sorted by name."""
    if not root.is_dir():
        raise UserError(f"data {root}: is no folder")
    if not any(root.iterdir()):
        raise UserError(f"data {root}: is empty; it should hold one folder a class")
    split = (root / "train").is_dir()
    if not split:
        for role in ("val", "unlabelled"):
            if (root / role).is_dir():
                raise UserError(f"data {root}: has a folder {role} but none named train")
    train = root / "train" if split else root
    classes = _folders(train)
    if not classes:
        raise UserError(f"data {train}: has no class folders; expected {train}/<class>/<image>")
    label_of = {name: label for label, name in enumerate(classes)}
    found = [(name, "train", label_of[c]) for c in classes for name in _images(root, train / c)]
    if split and (root / "val").is_dir():
        for name in _folders(root / "val"):
            if name not in label_of:
                raise UserError(f"data {root}: val has the class {name!r}, which train has not")
            label = label_of[name]
            found += [(file, "val", label) for file in _images(root, root / "val" / name)]
        if not any(role == "val" for _, role, _ in found):
            raise UserError(f"data {root / 'val'}: has no image; expected val/<class>/<image>")
    if split and (root / "unlabelled").is_dir():
        found += [(name, "unlabelled", UNKNOWN) for name in _images(root, root / "unlabelled")]
    return classes, sorted(found)


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(root: Path, top: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _usable(
    root: Path,
    found: list[tuple[str, str, int]],
    progress: Callable[[int, int], None] | None,
) -> tuple[list[tuple[str, str, int]], list[Inspection], list[str]]:
    """What can be decoded of `found`, what was seen in it, and the rest as "name: reason"."""
    inspected = inspect_all([root / name for name, _, _ in found], progress)
    skipped = []
    good = []
    for (name, role, label), it in zip(found, inspected, strict=True):
        fault = it.fault
        if not name.isprintable():  # among them: bytes that are no UTF-8
            fault = "its name holds unprintable characters"
        if fault is None:
            good.append(((name, role, label), it))
        else:
            skipped.append(f"{ascii(name)[1:-1] if not name.isprintable() else name}: {fault}")
    if len(skipped) > _TOLERATED * len(found):
        raise UserError(
            f"data {root}: {len(skipped)} of {len(found)} images cannot be used, more than "
            f"{_TOLERATED:.0%}; the first: {'; '.join(skipped[:_NAMED])}"
        )
    for line in skipped:
        _log.warning("skipped %s", line)
    return [entry for entry, _ in good], [it for _, it in good], skipped


def _parts(
    root: Path,
    classes: list[str],
    labels: NDArray[np.int64],
    roles: NDArray[np.str_],
    *,
    labelled_per_class: int | None,
    validation: int | float | None,
    seed: int,
) -> dict[str, NDArray[np.int64]]:
    train = [np.flatnonzero((roles == "train") & (labels == c)) for c in range(len(classes))]
    for name, ids in zip(classes, train, strict=True):
        if not len(ids):
            raise UserError(
                f"data {root}: the class {name!r} has no image ({' '.join(SUFFIXES)}); remove its "
                "folder or fill it"
            )
    held_out = np.flatnonzero(roles == "val")
    if not len(held_out):
        held_out, train = _hold_out(root, classes, train, validation, seed)
    if labelled_per_class is None:
        labelled = train
    else:
        labelled = _pick_labelled(root, classes, train, labelled_per_class, seed)
    shown = np.sort(np.concatenate(labelled))
    hidden = np.setdiff1d(np.concatenate([*train, np.flatnonzero(roles == "unlabelled")]), shown)
    return {"labelled": shown, "unlabelled": hidden, "validation": np.sort(held_out)}


def _hold_out(
    root: Path,
    classes: list[str],
    train: list[NDArray[np.int64]],
    validation: int | float | None,
    seed: int,
) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """Take the validation images out of train, at least one image of each class staying there."""
    counts = np.array([len(ids) for ids in train])
    total, spare = int(counts.sum()), int((counts - 1).sum())
    if validation is None:
        raise UserError(
            f"data {root}: has no val folder; say how many images, or which share, to take from "
            "train (validation)"
        )
    if isinstance(validation, float) and not 0 < validation < 1:
        raise UserError(f"validation {validation}: a share must be between 0 and 1")
    take = max(1, round(validation * total)) if isinstance(validation, float) else validation
    if take < 1:
        raise UserError(f"validation {validation}: must be at least 1 image")
    if take >= total:
        raise UserError(f"validation {validation}: {root} has only {total} images to train on")
    if take > spare:
        raise UserError(
            f"validation {validation}: would leave a class without a training image; {root} can "
            f"spare {spare}"
        )
    shares = share_out(counts, take, counts - 1)
    held, kept = [], []
    for name, ids, share in zip(classes, train, shares, strict=True):
        order = _shuffled(ids, f"validation {name}", seed)
        held.append(order[:share])
        kept.append(np.sort(order[share:]))
    return np.concatenate(held), kept


def _pick_labelled(
    root: Path,
    classes: list[str],
    train: list[NDArray[np.int64]],
    labelled_per_class: int,
    seed: int,
) -> list[NDArray[np.int64]]:
    if labelled_per_class < 1:
        raise UserError(
            f"labelled_per_class {labelled_per_class}: leaves the class {classes[0]!r} without a "
            "labelled image; must be at least 1"
        )
    for name, ids in zip(classes, train, strict=True):
        if len(ids) < labelled_per_class:
            raise UserError(
                f"labelled_per_class {labelled_per_class}: the class {name!r} of {root} has only "
                f"{len(ids)} training images"
            )
    return [
        _shuffled(ids, f"labelled {name}", seed)[:labelled_per_class]
        for name, ids in zip(classes, train, strict=True)
    ]


def _shuffled(ids: NDArray[np.int64], purpose: str, seed: int) -> NDArray[np.int64]:
    """Shuffle by seed and purpose alone: other classes coming or going change nothing."""
    word = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    key = np.array([seed, word], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(ids)
