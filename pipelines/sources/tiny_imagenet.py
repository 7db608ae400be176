"""Tiny-ImageNet (Stanford's CS231n, 2015) from tiny-imagenet-200.zip."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.sources.archives import Archive, ZipFile
from pipelines.sources.catalogue import Catalogue, Entries
from sbf_dist.errors import UserError

ARCHIVE = Archive(
    "tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
)
_ROOT = "tiny-imagenet-200"
_MAX_ARCHIVE_BYTES = 4 * 2**30  # the published one holds 0.3 GB
_TRAIN = re.compile(rf"{_ROOT}/train/(n\d{{8}})/images/(n\d{{8}}_\d+\.JPEG)")
_VAL = re.compile(rf"{_ROOT}/val/images/(val_\d+\.JPEG)")
_NUM_COLUMNS = 6  # file, class, and the four sides of a box


@contextmanager
def catalogue(path: Path) -> Iterator[Catalogue]:
    """The training and validation images; the test images have no labels and are left out.

    UserError for an archive of another layout.
    """
    with ZipFile(path, _MAX_ARCHIVE_BYTES) as archive:
        names = _class_names(archive)
        class_of = _validation_classes(archive, names)
        entries = Entries()
        members = []
        for member, size in sorted(archive.sizes.items()):
            if match := _TRAIN.fullmatch(member):
                if match[1] not in names:
                    raise UserError(f"archive {path}: {member} is of a class not in wnids.txt")
                entries.add("train", match[1], match[2], size)
            elif match := _VAL.fullmatch(member):
                if match[1] not in class_of:
                    raise UserError(f"archive {path}: {member} is not in val_annotations.txt")
                entries.add("val", class_of.pop(match[1]), match[1], size)
            else:
                continue
            members.append(member)
        if class_of:
            raise UserError(
                f"archive {path}: lacks val/images/{next(iter(class_of))}, which is in "
                "val_annotations.txt"
            )
        yield entries.catalogue(names, lambda i: archive.read(members[i]))


def _class_names(archive: ZipFile) -> dict[str, str]:
    """The classes of wnids.txt, and their names by words.txt."""
    listed = _text(archive, "wnids.txt").split()
    if not listed or not all(re.fullmatch(r"n\d{8}", wnid) for wnid in listed):
        raise UserError(f"archive {archive.path}: wnids.txt does not name the classes")
    names = dict(
        line.split("\t", 1) for line in _text(archive, "words.txt").splitlines() if "\t" in line
    )
    return {wnid: names.get(wnid, wnid).strip() for wnid in listed}


def _validation_classes(archive: ZipFile, classes: dict[str, str]) -> dict[str, str]:
    found = {}
    for number, line in enumerate(_text(archive, "val/val_annotations.txt").splitlines(), 1):
        columns = line.split("\t")
        if len(columns) != _NUM_COLUMNS or columns[1] not in classes:
            raise UserError(
                f"archive {archive.path}: line {number} of val_annotations.txt must have "
                f"{_NUM_COLUMNS} columns, the second a class of wnids.txt"
            )
        found[columns[0]] = columns[1]
    return found


def _text(archive: ZipFile, name: str) -> str:
    member = f"{_ROOT}/{name}"
    if member not in archive.sizes:
        raise UserError(f"archive {archive.path}: has no {member}")
    return archive.read(member).decode("utf-8", errors="replace")
