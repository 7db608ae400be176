"""Which pseudo-labelled images are used."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sbf_dist.distill.stored_labels import StoredLabels
from sbf_dist.errors import UserError
from sbf_dist.settings import PseudoLabels

_MAX_NAMED = 10  # classes in a warning


def select(
    classes: NDArray[np.int64],
    confidence: NDArray[np.float32],
    settings: PseudoLabels,
    agreement: NDArray[np.float32] | None = None,
) -> NDArray[np.bool_]:
    """Return which images are used, bool (n,).

    `classes` (n,) is the predicted class, `confidence` (n,) its probability, `agreement` (n,) the
    share of the teachers that predict it. An image is used if
    - its agreement is `min_agreement` at least,
    - its confidence reaches the threshold of its class (see thresholds),
    - with `per_class`, it is among so many of its class, the most confident (Yalniz et al., arXiv
      1905.00546, section 3), so that no class drowns the others. Ties go to the earlier image.

    UserError for `min_agreement` where the agreement is not known.
    """
    used = np.ones(len(classes), np.bool_)
    if settings.min_agreement > 0:
        if agreement is None:
            raise UserError(
                f"pseudo_labels.min_agreement = {settings.min_agreement:g}: the stored "
                "pseudo-labels were written by an older version, without the teachers' "
                "agreement; write them again (--again pseudo-labels)"
            )
        used = agreement >= np.float32(settings.min_agreement)
    if len(classes):
        least = thresholds(classes[used], confidence[used], settings, count=int(classes.max()) + 1)
        used &= confidence >= least[classes]
    if settings.per_class is None:
        return used
    balanced = np.zeros_like(used)
    for label in np.unique(classes[used]):
        members = np.flatnonzero(used & (classes == label))
        order = np.argsort(-confidence[members], kind="stable")
        balanced[members[order[: settings.per_class]]] = True
    return balanced


def thresholds(
    classes: NDArray[np.int64],
    confidence: NDArray[np.float32],
    settings: PseudoLabels,
    *,
    count: int,
) -> NDArray[np.float32]:
    """Return the smallest confidence of each of `count` classes, float32 (count,).

    It is `threshold`, or with `adaptive` that times b / (2 - b), b being the number of images of
    the class that reach `threshold`, as a share of the largest such number: curriculum pseudo
    labeling (Zhang et al., FlexMatch, arXiv 2110.08263, equations 6 to 8 and 11), once, on the
    final predictions, and without its warm-up, which is for a student that knows nothing yet. Of a
    class that never reaches `threshold` all images pass.
    """
    least = np.full(count, settings.threshold, np.float32)
    if settings.adaptive:
        reached = np.bincount(classes[confidence >= settings.threshold], minlength=count)
        share = reached / max(1, reached.max(initial=0))
        least *= (share / (2 - share)).astype(np.float32)
    return least


def choose(
    stored: StoredLabels, ids: NDArray[np.int64], settings: PseudoLabels
) -> NDArray[np.int64]:
    """Return those of the images `ids` that are used, as `select` says."""
    rows = stored.rows(ids)  # few columns of them: ids may be a million
    confidence = stored.probabilities[rows, 0].astype(np.float32)
    agreement = None if stored.agreement is None else stored.agreement[rows]
    return ids[select(stored.classes[rows, 0].astype(np.int64), confidence, settings, agreement)]


def check_choice(
    stored: StoredLabels,
    ids: NDArray[np.int64],
    chosen: NDArray[np.int64],
    settings: PseudoLabels,
) -> None:
    """UserError if there are images, and none of them is chosen."""
    if len(ids) and not len(chosen):
        highest = stored.probabilities[stored.rows(ids), 0].max()
        raise UserError(
            f"{_described(settings)} leaves none of {len(ids)} images without labels: the highest "
            f"confidence is {highest:.3g}; lower it"
        )


def unused_classes(
    stored: StoredLabels,
    ids: NDArray[np.int64],
    chosen: NDArray[np.int64],
    settings: PseudoLabels,
    names: Sequence[str],
) -> str | None:
    """Return a line on the classes of which no image of `ids` is among the chosen, if any.

    A class that the teachers predict of no image is in it, too, as such. `names` are all classes.
    """
    if not len(ids):
        return None
    predicted = np.bincount(stored.classes[stored.rows(ids), 0], minlength=len(names))
    used = np.bincount(stored.classes[stored.rows(chosen), 0], minlength=len(names))
    lost = np.flatnonzero((used == 0) & (predicted > 0))
    never = np.flatnonzero(predicted == 0)
    found = []
    if len(lost):
        found.append(f"{_described(settings)} leaves no image of {_named(lost, names, predicted)}")
    if len(never):
        found.append(f"the teachers predict {_named(never, names)} for no image without a label")
    return "; ".join(found) or None


def _described(settings: PseudoLabels) -> str:
    """Return the settings that leave images out, as a recipe has them."""
    parts = [f"pseudo_labels.threshold = {settings.threshold:g}"] if settings.threshold else []
    if settings.min_agreement:
        parts.append(f"pseudo_labels.min_agreement = {settings.min_agreement:g}")
    return " with ".join(parts)


def _named(
    classes: NDArray[np.int64], names: Sequence[str], counts: NDArray[np.int64] | None = None
) -> str:
    shown = [
        repr(names[c]) + (f" ({counts[c]} predicted)" if counts is not None else "")
        for c in classes[:_MAX_NAMED].tolist()
    ]
    more = len(classes) - len(shown)
    return ", ".join(shown) + (f" and {more} more classes" if more else "")
