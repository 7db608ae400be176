"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the archives of www.cs.toronto.edu/~kriz."""

import io
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.sources import pickles
from pipelines.sources.archives import Archive, compressed_members
from pipelines.sources.catalogue import Catalogue, Entries
from sbf_dist.errors import UserError

_SIDE_PIXELS = 32
_IMAGE_BYTES = 3 * _SIDE_PIXELS * _SIDE_PIXELS
_MAX_ARCHIVE_BYTES = 2**30  # the published ones hold 186 MB
_ORIGIN = "https://www.cs.toronto.edu/~kriz/cifar.html"
_CLASS = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Layout:
    """How one archive is laid out: its folder, its files by part, where labels and names are."""

    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    key: bytes  # python: the labels in a batch
    names_key: bytes  # python: the classes' names
    label_bytes: int = 0  # binary: in front of each image; the last one counts. 0: python


ARCHIVES = {
    "cifar10": (
        Archive("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", _ORIGIN),
        Archive("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", _ORIGIN),
    ),
    "cifar100": (
        Archive("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", _ORIGIN),
        Archive("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", _ORIGIN),
    ),
}
_TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
LAYOUTS = {
    "cifar-10-python.tar.gz": Layout(
        "cifar-10-batches-py", _TRAIN_FILES, "test_batch", "batches.meta", b"labels", b"label_names"
    ),
    "cifar-10-binary.tar.gz": Layout(
        "cifar-10-batches-bin",
        tuple(f"{name}.bin" for name in _TRAIN_FILES),
        "test_batch.bin",
        "batches.meta.txt",
        b"",
        b"",
        label_bytes=1,
    ),
    "cifar-100-python.tar.gz": Layout(
        "cifar-100-python", ("train",), "test", "meta", b"fine_labels", b"fine_label_names"
    ),
    "cifar-100-binary.tar.gz": Layout(
        "cifar-100-binary",
        ("train.bin",),
        "test.bin",
        "fine_label_names.txt",
        b"",
        b"",
        label_bytes=2,
    ),
}


def catalogue(path: Path) -> Catalogue:
    """All images of one of the four archives, as PNG files named by their place in their part.

    The python and the binary archive of a set give the same files. All pixels are held in memory
    (184 MB). Classes are the fine ones of CIFAR-100. UserError for an archive of another layout.
    """
    layout = LAYOUTS[path.name]
    content = _read(path, layout)
    names = _class_names(path, layout, content[layout.names])
    entries = Entries()
    batches: list[NDArray[np.uint8]] = []
    for part, files in (("train", layout.train), ("val", (layout.test,))):
        number = 0
        for file in files:
            images, labels = _batch(path, layout, file, content.pop(file))
            if len(labels) and not (labels.min() >= 0 and labels.max() < len(names)):
                raise UserError(f"archive {path}: {file} has a label beyond its {len(names)} names")
            batches.append(images)
            for label in labels.tolist():
                entries.add(part, names[label], f"{number:05}.png", _IMAGE_BYTES)
                number += 1
    # Not one array: that would hold everything twice for a moment.
    ends = list(accumulate(map(len, batches)))

    def read(i: int) -> bytes:
        batch = bisect_right(ends, i)
        return png(batches[batch][i - ends[batch]])

    return entries.catalogue({name: name.replace("_", " ") for name in names}, read)


def png(image: NDArray[np.uint8]) -> bytes:
    """An image of 3,072 bytes (red, green, blue planes of 32 rows) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(
        np.ascontiguousarray(image.reshape(3, _SIDE_PIXELS, _SIDE_PIXELS).transpose(1, 2, 0))
    ).save(file, "PNG")
    return file.getvalue()


def _read(path: Path, layout: Layout) -> dict[str, bytes]:
    wanted = {layout.names, layout.test, *layout.train}
    found = {}
    for name, read in compressed_members(path, _MAX_ARCHIVE_BYTES):
        folder, file = PurePosixPath(name).parent, PurePosixPath(name).name
        if str(folder) == layout.folder and file in wanted:
            found[file] = read()
    missing = sorted(wanted - found.keys())
    if missing:
        raise UserError(f"archive {path}: has no {layout.folder}/{missing[0]}")
    return found


def _class_names(path: Path, layout: Layout, data: bytes) -> list[str]:
    if layout.label_bytes:
        names = data.decode("latin1").split()
    else:
        listed = pickles.load(data, f"archive {path}: {layout.names}").get(layout.names_key)
        names = list(_decoded(listed)) if isinstance(listed, list) else []
    if not names or len(set(names)) < len(names) or not all(map(_CLASS.fullmatch, names)):
        raise UserError(f"archive {path}: {layout.names} does not name the classes")
    return names


def _decoded(names: list[object]) -> Iterator[str]:
    for name in names:
        yield name.decode("latin1") if isinstance(name, bytes) else str(name)


def _batch(
    path: Path, layout: Layout, file: str, data: bytes
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images uint8 (n, 3072) and labels of one file."""
    if layout.label_bytes:
        row = layout.label_bytes + _IMAGE_BYTES
        if not data or len(data) % row:
            raise UserError(
                f"archive {path}: {file} has {len(data)} bytes, not a multiple of {row}"
            )
        rows = np.frombuffer(data, np.uint8).reshape(-1, row)
        labels = rows[:, layout.label_bytes - 1].astype(np.int64)
        return rows[:, layout.label_bytes :], labels
    batch = pickles.load(data, f"archive {path}: {file}")
    images, listed = batch.get(b"data"), batch.get(layout.key)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2:
        raise UserError(f"archive {path}: {file} has no images in b'data'")
    if (
        images.shape[1] != _IMAGE_BYTES
        or not isinstance(listed, list)
        or len(listed) != len(images)
    ):
        raise UserError(
            f"archive {path}: {file} must have as many rows of {_IMAGE_BYTES} bytes in b'data' as "
            f"labels in {layout.key!r}"
        )
    if not all(type(label) is int and 0 <= label < 2**31 for label in listed):
        raise UserError(f"archive {path}: {file} has labels that are not numbers")
    return images, np.array(listed, dtype=np.int64)
