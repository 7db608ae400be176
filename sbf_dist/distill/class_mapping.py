"""The classes of a teacher that are not those of the images: a file, and what becomes of them."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sbf_dist.errors import UserError
from sbf_dist.files import read_bytes

MAX_BYTES = 10_000_000  # of a file of classes
NAMED = 4  # classes in a message


@dataclass(frozen=True)
class ClassMapping:
    """Which of a teacher's classes are classes of the images.

    size     number of the teacher's classes
    kept     (k,) int64: those of them that the images have
    targets  (k,) int64: which classes of the images they are; several may be the same
    classes  number of the images' classes
    """

    size: int
    kept: Tensor
    targets: Tensor
    classes: int

    def to(self, device: torch.device) -> "ClassMapping":
        """Return the same with its tensors on a device."""
        return ClassMapping(self.size, self.kept.to(device), self.targets.to(device), self.classes)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities (N, classes) of logits (N, size).

        Those of several classes that are one to the images are added up; those of classes that the
        images do not have are left out, and the others are divided by their sum.
        """
        inside = logits[:, self.kept].softmax(1)
        return inside.new_zeros(len(logits), self.classes).index_add_(1, self.targets, inside)


def read_classes(path: Path) -> list[tuple[str, str]]:
    """Return a teacher's classes in their order: its own name, and the name that the images have.

    UserError for a file that cannot be read, or has an empty line or nothing at all.
    """
    try:
        content = read_bytes(path, MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(
                f"classes {path}: is larger than {MAX_BYTES} bytes: not a list of classes"
            )
        lines = content.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"classes {path}: cannot be read as text: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        own, _, other = (part.strip() for part in line.partition("\t"))
        if not own:
            raise UserError(
                f"classes {path}: line {number} is empty; there must be a line for each of the "
                "teacher's classes, in its order"
            )
        found.append((own, other or own))
    if not found:
        raise UserError(f"classes {path}: is empty; it must have a line for each class")
    return found


def class_mapping(path: Path, classes: Sequence[str]) -> ClassMapping:
    """Return how the teacher's classes in a file map to `classes`, those of the images.

    UserError where the file names none for a class of the images, or a second column names a class
    that they do not have.
    """
    lines = read_classes(path)
    places = {name: place for place, name in enumerate(classes)}
    unknown = [other for own, other in lines if other != own and other not in places]
    if unknown:
        raise UserError(
            f"classes {path}: {unknown[0]!r} in the second column is not a class of the "
            f"images{_nearest(unknown[0], classes)}"
        )
    kept = [number for number, (_, other) in enumerate(lines) if other in places]
    targets = [places[lines[number][1]] for number in kept]
    missing = [name for name in classes if places[name] not in set(targets)]
    if missing:
        shown = ", ".join(map(repr, missing[:NAMED]))
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        hint = _nearest(missing[0], [own for own, _ in lines])
        raise UserError(
            f"classes {path}: no line is for {shown}{more} of the images' classes{hint}; add the "
            "images' name after the teacher's, separated by a tab"
        )
    return ClassMapping(len(lines), torch.tensor(kept), torch.tensor(targets), len(classes))


def _nearest(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    return f" ({matches[0]!r} is the most similar)" if matches else ""
