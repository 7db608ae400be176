"""The work of `sbf evaluate`: how often a student names the right class, overall and by class."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launchers.display import Display
from launchers.images import evaluation_loader
from launchers.labelled_images import Images
from sbf_dist.errors import UserError

# From normalised images, float32 (N, 3, H, W), to logits (N, classes).
Classifier = Callable[[NDArray[np.float32]], NDArray[np.float32]]
_NAMED = 3  # classes in an error


@dataclass(frozen=True)
class Score:
    """Shares of `images` in [0, 1]; top5 is None for at most five classes."""

    images: int
    top1: float
    top5: float | None


@dataclass(frozen=True)
class Scores:
    """The score of all images, and of those of each class that has some."""

    all: Score
    classes: dict[str, Score]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self.all), "classes": {n: asdict(s) for n, s in self.classes.items()}}


def evaluate(
    classify: Classifier, classes: Sequence[str], images: Images, display: Display
) -> Scores:
    """Score a student on the validation part of `images`.

    classes: the student's, in the order of its logits; labels are matched by name, see `positions`.
    """
    place = positions(images.index.classes, classes, str(images.index.root))
    ids = images.validation
    if not len(ids):
        raise UserError(f"data {images.index.root}: has no validation image")
    counts = np.zeros((3, len(images.index.classes)), dtype=np.int64)  # images, top-1, top-5
    done = 0
    for batch in evaluation_loader(images.data, images.index, ids):
        labels = batch["label"].numpy()
        logits = classify(np.ascontiguousarray(batch["image"].numpy()))
        ranked = np.argsort(-logits, axis=1, kind="stable")[:, :5] == place[labels][:, None]
        for row, hits in enumerate((np.ones(len(labels)), ranked[:, 0], ranked.any(1))):
            np.add.at(counts[row], labels, hits.astype(np.int64))
        done += len(labels)
        display.show({"title": "evaluate", "step": done, "steps": len(ids)})
    few = len(classes) <= 5
    return Scores(
        _score(counts.sum(1), few=few),
        {
            name: _score(column, few=few)
            for name, column in zip(images.index.classes, counts.T, strict=True)
            if column[0]
        },
    )


def positions(found: Sequence[str], known: Sequence[str], place: str) -> NDArray[np.int64]:
    """Return where the classes of images at `place` stand among a student's.

    By name; by number where the student has no names but "0", "1", … and as many classes. Raises
    UserError for a class that the student does not know.
    """
    numbers = [str(number) for number in range(len(known))]
    if list(known) == numbers and len(found) == len(known):
        return np.arange(len(found))
    where = {name: number for number, name in enumerate(known)}
    strangers = [name for name in found if name not in where]
    if strangers:
        raise UserError(
            f"data {place}: the student does not know the class {strangers[0]!r}; it knows "
            f"{', '.join(known[:_NAMED])}{', …' if len(known) > _NAMED else ''}"
        )
    return np.array([where[name] for name in found])


def _score(counts: NDArray[np.int64], *, few: bool) -> Score:
    number, first, five = counts.tolist()
    return Score(number, first / number, None if few else five / number)
