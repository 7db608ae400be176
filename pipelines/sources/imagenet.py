"""ILSVRC-2012 (Russakovsky et al. 2015) from its training, validation and devkit archives."""

import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from os import sched_getaffinity
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.sources.archives import (
    MAX_IMAGE_BYTES,
    Archive,
    Member,
    Progress,
    TarFile,
    compressed_members,
)
from pipelines.sources.catalogue import Catalogue, Entries
from sbf_dist.errors import UserError

_ORIGIN = "https://image-net.org/challenges/LSVRC/2012/ (an account is needed)"
TRAIN = Archive("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e", _ORIGIN)
VALIDATION = Archive("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622", _ORIGIN)
DEVKIT = Archive("ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf", _ORIGIN)

_MAX_DEVKIT_BYTES = 64 * 2**20
_MAX_META_BYTES = 4 * 2**20  # zlib's factor is 1,032 at most
_META = "ILSVRC2012_devkit_t12/data/meta.mat"
_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
_CLASS_TAR = re.compile(r"(n\d{8})\.tar")
_TRAIN_IMAGE = re.compile(r"n\d{8}_\d+\.JPEG")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


@contextmanager
def catalogue(
    train: Path, validation: Path, devkit: Path, progress: Progress | None = None
) -> Iterator[Catalogue]:
    """The training images in the order of their archive, then the validation images.

    Only headers are read here. A validation image's class is the line of its number in the ground
    truth, an ILSVRC2012_ID that meta.mat gives a WordNet id; the IDs are not in the order of the
    WordNet ids. UserError for archives of another layout.
    """
    wnids, names, truth = _devkit(devkit)
    with ExitStack() as files:
        train_tar = files.enter_context(TarFile(train))
        val_tar = files.enter_context(TarFile(validation))
        entries = Entries()
        # Offsets in numbers, not as a million of objects.
        offsets: list[int] = []
        for wnid, image in _train_images(train_tar, set(names), progress):
            _add(entries, offsets, "train", wnid, image)
        trained = len(offsets)
        for number, image in _validation_images(val_tar, len(truth)):
            _add(entries, offsets, "val", wnids[int(truth[number - 1])], image)
        where = np.array(offsets, dtype=np.int64)

        def read(i: int) -> bytes:
            tar = train_tar if i < trained else val_tar
            return tar.read(Member(entries.files[i], int(where[i]), entries.sizes[i]))

        yield entries.catalogue(names, read)


def _add(entries: Entries, offsets: list[int], part: str, wnid: str, image: Member) -> None:
    entries.add(part, wnid, image.name, image.size)
    offsets.append(image.offset)


def _train_images(
    tar: TarFile, classes: set[str], progress: Progress | None
) -> Iterator[tuple[str, Member]]:
    """Every training image with its class, class by class as the archive has them."""
    class_tars = []
    for member in tar.members():
        match = _CLASS_TAR.fullmatch(member.name)
        if match is None or match[1] not in classes:
            raise UserError(
                f"archive {tar.path}: {member.name} is not a tar file of a class of the devkit's "
                "meta.mat"
            )
        class_tars.append((match[1], member))
    missing = sorted(classes - {wnid for wnid, _ in class_tars})
    hint = f"; {missing[0]}.tar is missing" if missing else ""
    if missing or len(class_tars) > len(classes):
        raise UserError(
            f"archive {tar.path}: has {len(class_tars)} tar files of classes, the devkit's "
            f"meta.mat has {len(classes)} classes{hint}"
        )
    # Two threads a processor: most of the time goes into waiting for the disk.
    with ThreadPoolExecutor(2 * len(sched_getaffinity(0))) as pool:
        listings = pool.map(lambda entry: _listing(tar, entry[1]), class_tars)
        for done, ((wnid, _), images) in enumerate(zip(class_tars, listings, strict=True), 1):
            for image in images:
                if not image.name.startswith(f"{wnid}_"):
                    raise UserError(f"archive {tar.path}: {image.name} does not belong to {wnid}")
                yield wnid, image
            if progress is not None:
                progress(f"headers of {tar.path.name}", done, len(class_tars), "classes")


def _listing(tar: TarFile, within: Member) -> list[Member]:
    images = list(tar.members(within))
    for image in images:
        _check_image(tar, image, _TRAIN_IMAGE)
    if len({image.name for image in images}) < len(images):
        raise UserError(f"archive {tar.path}: {within.name} has a file twice")
    return images


def _validation_images(tar: TarFile, count: int) -> Iterator[tuple[int, Member]]:
    """Every validation image with its number, 1 … count."""
    seen: set[int] = set()
    for image in tar.members():
        number = int(_check_image(tar, image, _VAL_IMAGE)[1])
        if not 1 <= number <= count or number in seen:
            raise UserError(f"archive {tar.path}: {image.name} is there twice, or beyond {count}")
        seen.add(number)
        yield number, image
    if len(seen) < count:
        raise UserError(
            f"archive {tar.path}: has {len(seen)} images, the devkit's ground truth has {count}"
        )


def _check_image(tar: TarFile, image: Member, pattern: re.Pattern[str]) -> re.Match[str]:
    match = pattern.fullmatch(image.name)
    if match is None or image.size > MAX_IMAGE_BYTES:
        raise UserError(
            f"archive {tar.path}: {image.name} of {image.size:,} bytes is not an image of "
            "ILSVRC-2012"
        )
    return match


def _devkit(path: Path) -> tuple[dict[int, str], dict[str, str], NDArray[np.int64]]:
    """ILSVRC2012_ID → WordNet id; WordNet id → words; the ID of each validation image."""
    found = {}
    for name, read in compressed_members(path, _MAX_DEVKIT_BYTES):
        if name in (_META, _TRUTH):
            found[name] = read()
    for name in (_META, _TRUTH):
        if name not in found:
            raise UserError(f"archive {path}: has no {name}")
    wnids, names = _synsets(path, found[_META])
    try:
        truth = np.array([int(line) for line in found[_TRUTH].split()], dtype=np.int64)
    except ValueError:
        raise UserError(f"archive {path}: {_TRUTH} must have a number in each line") from None
    unknown = set(truth.tolist()) - wnids.keys()
    if unknown:
        raise UserError(f"archive {path}: meta.mat has no class {min(unknown)} of the ground truth")
    return wnids, names, truth


def _synsets(path: Path, meta: bytes) -> tuple[dict[int, str], dict[str, str]]:
    """The classes of meta.mat: its synsets without children (the others are their hypernyms)."""
    # loadmat builds arrays and nothing else: MATLAB's functions and objects stay opaque bytes.
    from scipy.io import loadmat

    if len(meta) > _MAX_META_BYTES:
        raise UserError(
            f"archive {path}: meta.mat has {len(meta):,} bytes, far more than it should"
        )
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
        leaves = [synset for synset in np.atleast_1d(synsets) if int(synset["num_children"]) == 0]
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in leaves}
        names = {str(synset["WNID"]): str(synset["words"]) for synset in leaves}
    except Exception as error:  # scipy raises whatever a damaged file leads it to
        raise UserError(f"archive {path}: meta.mat has no synsets ({error!r})") from error
    if not names or not all(re.fullmatch(r"n\d{8}", wnid) for wnid in names):
        raise UserError(f"archive {path}: meta.mat does not name the classes")
    return wnids, names
