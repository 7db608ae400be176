"""A folder of images, prepared by this program or by hand, as a data index."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.index import DataIndex
from pipelines.inspection import Inspection, inspect_all
from pipelines.overlap import in_validation
from pipelines.roots import Root, root_of
from pipelines.sources.listing import Listing, joined, list_images, list_unlabelled
from pipelines.splits import Selection, parts
from sbf_dist.errors import UserError

_log = logging.getLogger(__name__)

Ids = NDArray[np.int64]
Parts = dict[str, Ids]

_MAX_UNUSABLE_SHARE = 0.01  # the share of unusable files that is skipped rather than refused
_MAX_NAMED = 3  # so many files are named in an error


def index_folder(
    root: Path | str,
    *,
    labelled_per_class: int | float | None,
    validation: int | float | None,
    seed: int,
    split: Path | None = None,
    unlabelled: Path | str | None = None,
    expected: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataIndex:
    """Index the images below `root`.

    Layouts:
        root/<class>/**            images in any depth below the class
        root/train/<class>/**      with optional root/val/<class>/** and, without classes,
                                   root/unlabelled/**; also Train, training, valid, validation
        root/manifest.json         a set that sbf data prepare wrote, as files or in shards; the
                                   root may be the address of one in shards in an object store
    Images are known by their suffix (jpg jpeg jpe jfif png bmp webp tif tiff ppm pgm, in any case;
    of others, as gif and heic, the log has the number); names that begin with a dot are passed
    over, links to folders are followed only for classes.

    labelled_per_class, split, validation, seed   see splits.Selection
    unlabelled   a folder of other images, in any depth, for the part "unlabelled"; of a prepared
                 set its training images
    expected     the set that it must be, by manifest and number of classes; see list_images
    progress     called with (files read, files in all)

    Every file is read once, except those of prepared sets: they were read then. Files that cannot
    be decoded are skipped, logged and listed in `skipped`; more than 1 % of them is an error.
    UserError for every mistake of layout or number, naming the class and the count.
    """
    place = root_of(root)
    selection = Selection(labelled_per_class, split, validation, seed)
    listing = _listing(place, expected, unlabelled)

    def divide(files: list[str], labels: Ids, roles: Sequence[str], skipped: list[str]) -> Parts:
        names = [line.partition(": ")[0] for line in skipped]
        return parts(
            place, listing.classes, files, labels, np.array(roles), selection, skipped=names
        )

    return _index(place, listing, divide, progress)


def index_plain(root: Path, *, progress: Callable[[int, int], None] | None = None) -> DataIndex:
    """Index all images below `root`, in any depth, as unlabelled ones of no classes.

    Files that cannot be decoded are treated as index_folder does. UserError if there is no image.
    """
    root = Path(root).expanduser().absolute()
    none = np.zeros(0, dtype=np.int64)

    def divide(files: list[str], *_: object) -> Parts:
        return {"labelled": none, "unlabelled": np.arange(len(files)), "validation": none}

    return _index(root, list_unlabelled(root, root), divide, progress)


def index_evaluated(
    root: Path | str, *, progress: Callable[[int, int], None] | None = None
) -> DataIndex:
    """Index the images of a labelled folder, all that are evaluated in the part "validation".

    Those of its val folder; where it has none, all in its class folders. Layouts, faults and errors
    are index_folder's.
    """
    none = np.zeros(0, dtype=np.int64)
    place = root_of(root)

    def divide(_files: list[str], _labels: Ids, roles: Sequence[str], _skipped: list[str]) -> Parts:
        held_out = np.flatnonzero(np.array(roles) == ("val" if "val" in roles else "train"))
        return {"labelled": none, "unlabelled": none, "validation": held_out}

    return _index(place, list_images(place), divide, progress)


def _index(
    root: Root,
    listing: Listing,
    divide: Callable[[list[str], Ids, list[str], list[str]], Parts],
    progress: Callable[[int, int], None] | None,
) -> DataIndex:
    inspected = _inspected(root, listing, progress)
    good, skipped = _usable(root, listing.files, inspected)
    files = [listing.files[row] for row in good]
    labels = listing.labels[good]
    usable = [inspected[row] for row in good]
    index = DataIndex(
        root=root,
        classes=listing.classes,
        files=files,
        labels=labels,
        sizes=np.array([(it.height, it.width) for it in usable], dtype=np.int64),
        file_bytes=np.array([it.bytes for it in usable], dtype=np.int64),
        parts=divide(files, labels, [listing.roles[row] for row in good], skipped),
        skipped=skipped,
        shards=listing.shards,
        shard=listing.shard[good] if listing.shards else None,
        offset=listing.offset[good] if listing.shards else None,
        contents=None if listing.contents is None else listing.contents.take(good),
    )
    digests = None if listing.digests is None else listing.digests[good]
    _check_overlap(index, np.array([listing.roles[row] for row in good]), digests)
    _log.info(
        "%s: %d classes, %s, %d skipped",
        root,
        len(listing.classes),
        ", ".join(f"{len(ids)} {part}" for part, ids in index.parts.items()),
        len(skipped),
    )
    return index


def _check_overlap(
    index: DataIndex, roles: NDArray[np.str_], digests: NDArray[np.uint8] | None
) -> None:
    """UserError for images of an unlabelled set that are validation images as well.

    Where images that hide their class are, they came with the set, which may be a published one:
    that is logged.
    """
    hidden = index.parts["unlabelled"]
    shared = in_validation(index, hidden, digests)
    added = [pair for pair in shared if roles[pair[0]] == "unlabelled"]
    for pairs in (added, shared):
        if not pairs:
            continue
        named = ", ".join(
            f"{index.files[one]} is {index.files[other]}" for one, other in pairs[:_MAX_NAMED]
        )
        line = (
            f"data {index.root}: {len(pairs)} of {len(hidden)} unlabelled images are validation "
            f"images, too, by their content: {named}"
        )
        if pairs is added:
            raise UserError(f"{line}; remove them from the unlabelled ones")
        _log.warning("%s", line)


def check_folder(
    root: Path | str,
    *,
    labelled_per_class: int | float | None,
    validation: int | float | None,
    seed: int,
    split: Path | None = None,
    unlabelled: Path | str | None = None,
    expected: str | None = None,
) -> int:
    """Raise what index_folder would raise before it reads an image: mistakes of layout and number.

    Returns the number of classes. Files that cannot be decoded are only found by reading them, so
    index_folder may still raise.
    """
    place = root_of(root)
    selection = Selection(labelled_per_class, split, validation, seed)
    listing = _listing(place, expected, unlabelled)
    parts(place, listing.classes, listing.files, listing.labels, np.array(listing.roles), selection)
    if len(listing.classes) < 2:
        raise UserError(
            f"data {place}: has one class only, {listing.classes[0]!r}; a classifier needs two"
        )
    return len(listing.classes)


def _listing(root: Root, expected: str | None, unlabelled: Path | str | None) -> Listing:
    listing = list_images(root, expected)
    if unlabelled is None:
        return listing
    return joined(listing, list_unlabelled(root_of(unlabelled), root), root)


def _inspected(
    root: Root, listing: Listing, progress: Callable[[int, int], None] | None
) -> list[Inspection]:
    """What each image holds; of prepared files it is checked that they have their sizes still."""
    unread = [row for row, it in enumerate(listing.seen) if it is None]
    found: dict[int, Inspection] = {}
    if isinstance(root, Path):  # in a store, nothing but prepared sets is listed
        read = inspect_all([root / listing.files[row] for row in unread], progress)
        found = dict(zip(unread, read, strict=True))
    for row, it in enumerate(listing.seen):
        if it is not None:
            if isinstance(root, Path) and listing.shard[row] < 0:
                _check_unchanged(root, listing.files[row], it)
            found[row] = it
    return [found[row] for row in range(len(listing.files))]


def _check_unchanged(root: Path, name: str, prepared: Inspection) -> None:
    try:
        size = (root / name).stat().st_size
    except OSError:
        raise UserError(f"data {root}: {name} is missing; sbf data check shows what else") from None
    if prepared.fault is None and size != prepared.bytes:
        raise UserError(
            f"data {root}: {name} has changed since it was prepared; sbf data check shows what else"
        )


def _usable(
    root: Root, files: Sequence[str], inspected: Sequence[Inspection]
) -> tuple[list[int], list[str]]:
    """The rows that can be decoded, and the rest as "name: reason"."""
    skipped = []
    good = []
    for row, (name, it) in enumerate(zip(files, inspected, strict=True)):
        fault = it.fault
        if not name.isprintable():  # among them: bytes that are no UTF-8
            fault = "its name holds unprintable characters"
        if fault is None:
            good.append(row)
        else:
            skipped.append(f"{ascii(name)[1:-1] if not name.isprintable() else name}: {fault}")
    if len(skipped) > _MAX_UNUSABLE_SHARE * len(files):
        raise UserError(
            f"data {root}: {len(skipped)} of {len(files)} images cannot be used, more than "
            f"{_MAX_UNUSABLE_SHARE:.0%}; the first: {'; '.join(skipped[:_MAX_NAMED])}"
        )
    for line in skipped:
        _log.warning("skipped %s", line)
    return good, skipped
