"""What pseudo-labels look like: counts, confidence, and how often they are right, as numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbf_dist.distill.stored_labels import StoredLabels

BINS = 15  # of confidence, as in Guo et al.
UNKNOWN = -1
USED = "used"  # of the images without labels, those that are trained on
Ids = NDArray[np.int64]


def describe(
    stored: StoredLabels,
    parts: Mapping[str, Ids],
    classes: Sequence[str],
    teachers: Sequence[str],
    *,
    labels: NDArray[np.int64] | None = None,
    used: Ids | None = None,
) -> dict[str, Any]:
    """Return the figures of a store, fit for JSON.

    parts   ids of the images of each part; of "unlabelled", or of all parts if it is empty, the
            counts of classes are
    labels  the true class of the image with the id i at place i, -1 where unknown
    used    ids of the images that are used of "unlabelled"; None: not known

    "parts" has means and, over the images whose class is known ("known" of them), accuracy and
    ECE; "reliability" the bins behind the ECE, see _reliability; "per_class" how many images are
    predicted, and used, of each class; "agreement" the images, and their accuracy, for each share
    of the teachers that agree.
    """
    subject = parts.get("unlabelled", np.zeros(0, np.int64))
    shown = subject if len(subject) else np.concatenate(list(parts.values()))
    groups = dict(parts) if used is None or not len(subject) else dict(parts) | {USED: used}
    rows = {name: _Group(stored.take(ids), labels, ids) for name, ids in groups.items() if len(ids)}
    counted = stored.take(shown)
    per_class = {"predicted": _counts(counted, len(classes))}
    if USED in rows:
        per_class[USED] = _counts(rows[USED].stored, len(classes))
    return {
        "images": len(stored),
        "teachers": list(teachers),
        "classes": list(classes),
        "parts": [{"part": name, **group.means()} for name, group in rows.items()],
        "per_class": per_class,
        "confidence": {name: group.histogram() for name, group in rows.items()},
        "reliability": {
            name: group.reliability() for name, group in rows.items() if len(group.known)
        },
        "agreement": _Group(counted, labels, shown).agreements(),
    }


class _Group:
    """Some images: their pseudo-labels, and which of them are right as far as that is known."""

    def __init__(self, stored: StoredLabels, labels: Ids | None, ids: Ids) -> None:
        self.stored = stored
        truth = np.full(len(ids), UNKNOWN) if labels is None else labels[ids]
        self.known = np.flatnonzero(truth != UNKNOWN)
        self._right = stored.predicted == truth
        self._confidence = stored.confidence

    def means(self) -> dict[str, Any]:
        agreement = self.stored.agreement
        return {
            "images": len(self.stored),
            "confidence": _mean(self._confidence),
            "entropy": _mean(self.stored.entropy),
            "margin": _mean(self.stored.margin),
            "agreement": None if agreement is None else _mean(agreement),
            "known": len(self.known),
            "accuracy": _mean(self._right[self.known]),
            "ece": self._ece() if len(self.known) else None,
        }

    def histogram(self) -> list[int]:
        return np.bincount(self._bins(), minlength=BINS).tolist()

    def reliability(self) -> list[dict[str, Any]]:
        """The bins of confidence that hold images of known class: number, means of both."""
        bins = self._bins()[self.known]
        found = []
        for number in range(BINS):
            members = self.known[bins == number]
            if len(members):
                found.append(
                    {
                        "images": len(members),
                        "confidence": _mean(self._confidence[members]),
                        "accuracy": _mean(self._right[members]),
                    }
                )
        return found

    def agreements(self) -> list[dict[str, Any]]:
        agreement = self.stored.agreement
        if agreement is None:
            return []
        found = []
        for share in np.unique(agreement):
            members = np.flatnonzero(agreement == share)
            judged = np.intersect1d(members, self.known)
            found.append(
                {
                    "agreement": round(float(share), 4),
                    "images": len(members),
                    "accuracy": _mean(self._right[judged]),
                }
            )
        return found

    def _bins(self) -> NDArray[np.int64]:
        return np.clip((self._confidence * BINS).astype(np.int64), 0, BINS - 1)

    def _ece(self) -> float:
        """Expected calibration error: Guo et al., arXiv 1706.04599, equation 5."""
        gaps = [b["images"] * abs(b["accuracy"] - b["confidence"]) for b in self.reliability()]
        return sum(gaps) / len(self.known)


def _counts(stored: StoredLabels, classes: int) -> list[int]:
    return np.bincount(stored.predicted, minlength=classes).tolist()


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean(dtype=np.float64)) if len(values) else None
