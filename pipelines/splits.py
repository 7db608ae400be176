"""Which training images have a label: chosen by number or share, or listed in a file."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from pipelines.roots import Root
from sbf_dist.errors import UserError
from sbf_dist.files import write_text

_MAX_NAMED = 3  # names of a list that an error shows


@dataclass(frozen=True)
class Selection:
    """How images are divided into parts.

    labelled     so many random images of each class (int), or which share of each class (float in
                 (0, 1), one at least), are labelled, the rest of train is unlabelled; a smaller
                 number picks a subset of what a larger one picks. None: all are labelled
    split        file that lists the labelled images (read_split), instead of `labelled`
    validation   where there is no val folder: how many images (int) or which share of them (float
                 in (0, 1)) is taken from train, in proportion to the classes. Where there is one,
                 it is used, and this is ignored
    """

    labelled: int | float | None = None
    split: Path | None = None
    validation: int | float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.labelled is not None and self.split is not None:
            raise UserError(
                f"labelled_per_class {self.labelled}, split {self.split}: give one of the two"
            )


def read_split(path: Path) -> list[str]:
    """The labelled images of a split: one name a line; empty lines and lines with "#" are passed.

    UserError if the file is missing, empty or not text.
    """
    if path.exists() and not path.is_file():  # of /dev/zero there is no end
        raise UserError(f"split {path}: is not a list of images")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"split {path}: cannot be read ({reason})") from None
    names = [line.strip() for line in lines]
    names = [name for name in names if name and not name.startswith("#")]
    if not names:
        raise UserError(f"split {path}: lists no image")
    return names


def write_split(path: Path, names: Iterable[str], heading: str) -> None:
    """Write a list that read_split reads, in one step; UserError where that is impossible."""
    text = "".join(f"{line}\n" for line in (f"# {heading}", *names))
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"split {path}: cannot be written ({error.strerror})") from error


def parts(
    root: Root,
    classes: Sequence[str],
    files: Sequence[str],
    labels: NDArray[np.int64],
    roles: NDArray[np.str_],
    selection: Selection,
    *,
    skipped: Iterable[str] = (),
) -> dict[str, NDArray[np.int64]]:
    """The ids of "labelled", "unlabelled" and "validation", as DataIndex has them.

    `roles` says of each file whether it is of "train", "val" or "unlabelled"; `skipped` are files
    that were left out, which a split may name all the same. UserError, naming root, class and
    count, for numbers that do not fit and for classes without a labelled image.
    """
    train = by_class(root, classes, labels, roles)
    held_out = np.flatnonzero(roles == "val")
    if not len(held_out):
        held_out, train = _hold_out(root, classes, train, selection)
    if selection.split is not None:
        labelled = _listed(root, classes, files, train, selection.split, skipped)
    elif selection.labelled is not None:
        labelled = pick_labelled(root, classes, train, selection.labelled, selection.seed)
    else:
        labelled = train
    shown = np.sort(np.concatenate(labelled))
    hidden = np.setdiff1d(np.concatenate([*train, np.flatnonzero(roles == "unlabelled")]), shown)
    return {"labelled": shown, "unlabelled": hidden, "validation": np.sort(held_out)}


def by_class(
    root: Root, classes: Sequence[str], labels: NDArray[np.int64], roles: NDArray[np.str_]
) -> list[NDArray[np.int64]]:
    """The ids of each class's training images; UserError for a class without one."""
    rows = np.flatnonzero(roles == "train")
    rows = rows[np.argsort(labels[rows], kind="stable")]
    train = np.split(rows, np.searchsorted(labels[rows], np.arange(1, len(classes))))
    for name, ids in zip(classes, train, strict=True):
        if not len(ids):
            raise UserError(
                f"data {root}: the class {name!r} has no image in train; remove its folder or "
                "add images"
            )
    return train


def pick_labelled(
    root: Root,
    classes: Sequence[str],
    train: Sequence[NDArray[np.int64]],
    labelled: int | float,
    seed: int,
) -> list[NDArray[np.int64]]:
    """Random ids of each class; a smaller number picks a subset of what a larger one picks."""
    if isinstance(labelled, float) and not 0 < labelled < 1:
        raise UserError(f"labelled_per_class {labelled}: a share must be between 0 and 1")
    if labelled < 1 and not isinstance(labelled, float):
        raise UserError(
            f"labelled_per_class {labelled}: leaves the class {classes[0]!r} without a labelled "
            "image; must be at least 1"
        )
    picked = []
    for name, ids in zip(classes, train, strict=True):
        count = max(1, round(labelled * len(ids))) if isinstance(labelled, float) else labelled
        if len(ids) < count:
            raise UserError(
                f"labelled_per_class {labelled}: the class {name!r} of {root} has only {len(ids)} "
                "training images"
            )
        picked.append(_shuffled(ids, f"labelled {name}", seed)[:count])
    return picked


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


def _listed(
    root: Root,
    classes: Sequence[str],
    files: Sequence[str],
    train: Sequence[NDArray[np.int64]],
    split: Path,
    skipped: Iterable[str],
) -> list[NDArray[np.int64]]:
    """The training images that a split names, by path or, where that is unique, by file name."""
    rows = np.concatenate(list(train))
    ids = {files[row]: row for row in rows.tolist()}
    short: dict[str, int | None] = {}
    for name, row in ids.items():
        last = PurePosixPath(name).name
        short[last] = None if last in short else row
    left_out = set(skipped)
    left_out |= {PurePosixPath(name).name for name in left_out}
    found: set[int] = set()
    strangers = []
    for name in read_split(split):
        row = ids.get(name, short.get(name))
        if row is not None:
            found.add(row)
        elif name not in left_out:
            strangers.append(name)
    if strangers:
        raise UserError(
            f"split {split}: {len(strangers)} of its names do not match exactly one training image "
            f"of {root}: {', '.join(strangers[:_MAX_NAMED])}"
        )
    chosen = np.array(sorted(found), dtype=np.int64)
    labelled = [np.intersect1d(ids_of_class, chosen) for ids_of_class in train]
    for name, those in zip(classes, labelled, strict=True):
        if not len(those):
            raise UserError(f"split {split}: leaves the class {name!r} without a labelled image")
    return labelled


def _hold_out(
    root: Root,
    classes: Sequence[str],
    train: list[NDArray[np.int64]],
    selection: Selection,
) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """Take the validation images out of train, at least one image of each class staying there."""
    validation = selection.validation
    counts = np.array([len(ids) for ids in train])
    total, spare = int(counts.sum()), int((counts - 1).sum())
    if validation is None:
        raise UserError(
            f"data {root}: has no val folder; set validation to the number or share of images to "
            "take from train"
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
            f"validation {validation}: would leave a class without a training image; at most "
            f"{spare} of {root} can be held out"
        )
    shares = share_out(counts, take, counts - 1)
    held, kept = [], []
    for name, ids, share in zip(classes, train, shares, strict=True):
        order = _shuffled(ids, f"validation {name}", selection.seed)
        held.append(order[:share])
        kept.append(np.sort(order[share:]))
    return np.concatenate(held), kept


def _shuffled(ids: NDArray[np.int64], purpose: str, seed: int) -> NDArray[np.int64]:
    """Shuffle by seed and purpose alone: other classes coming or going change nothing."""
    subkey = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    key = np.array([seed, subkey], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(ids)
