"""The work of `sbf predict`: which pictures are meant, and what the student says of them.

By ONNX Runtime alone: nothing here imports PyTorch.
"""

import glob
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from launchers.machine import available_cpus
from pipelines.inspection import SUFFIXES
from sbf_dist.errors import UserError
from sbf_dist.export.sbf_student import Student

FROM_STDIN = "-"
_MAGIC = set("*?[")


@dataclass(frozen=True)
class Prediction:
    """What the student says of one picture.

    top    (class, probability), the most probable first; empty if the picture is not readable
    error  why it is not readable, in one line
    """

    image: str
    top: list[tuple[str, float]] = field(default_factory=list)
    error: str | None = None


def find_pictures(places: Sequence[str], lines: Iterable[str]) -> list[str]:
    """Return the files that files, folders, patterns and `-` (a list, one a line) stand for.

    A folder stands for all pictures below it, a pattern for what it matches ("**" for any depth).
    Raises UserError for a place that does not exist, and for one without a picture.
    """
    found: list[str] = []
    for place in places:
        path = Path(place)
        if place == FROM_STDIN:
            listed = [line.rstrip("\r\n") for line in lines]
            some = [line for line in listed if line.strip()]
            if not some:
                raise UserError("standard input lists no image")
        elif path.is_dir():
            some = sorted(
                str(one)
                for one in path.rglob("*")
                if one.suffix.lower() in SUFFIXES and one.is_file()
            )
            if not some:
                raise UserError(f"folder {place} holds no image ({' '.join(SUFFIXES)})")
        elif path.exists():
            some = [place]
        elif _MAGIC & set(place):
            # pathlib's own glob takes no absolute patterns.
            matched = glob.glob(place, recursive=True)  # noqa: PTH207
            some = sorted(one for one in matched if Path(one).is_file())
            if not some:
                raise UserError(f"pattern {place!r} matches no file")
        else:
            raise UserError(f"image {place} does not exist")
        found += some
    return found


def predictions(student: Student, pictures: Sequence[str], top: int) -> Iterator[Prediction]:
    """Give what `student` says of each picture, in their order; its `top` classes.

    A picture that is not readable has an error, and the others go on.
    """
    with ThreadPoolExecutor(available_cpus()) as pool:
        for start in range(0, len(pictures), student.batch_size):
            names = pictures[start : start + student.batch_size]
            read = list(pool.map(lambda name: _read(student, name), names))
            images = [image for image in read if not isinstance(image, str)]
            rows = iter(
                student.predict(np.stack(images))["probabilities"] if images else np.empty((0, 0))
            )
            for name, image in zip(names, read, strict=True):
                if isinstance(image, str):
                    yield Prediction(name, error=image)
                    continue
                probabilities = next(rows)
                order = np.argsort(-probabilities, kind="stable")[:top]
                yield Prediction(
                    name, [(str(student.classes[i]), float(probabilities[i])) for i in order]
                )


def _read(student: Student, picture: str) -> np.ndarray | str:
    """Return the pixels, or why the picture is not readable."""
    try:
        return student.read(picture)
    except ValueError as error:
        return str(error)
