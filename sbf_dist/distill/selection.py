"""Which pseudo-labelled images are used."""

import numpy as np
from numpy.typing import NDArray

from sbf_dist.settings import PseudoLabels


def select(
    classes: NDArray[np.int64],
    confidence: NDArray[np.float32],
    settings: PseudoLabels,
) -> NDArray[np.bool_]:
    """Return which images are used, bool (n,).

    `classes` (n,) is the predicted class, `confidence` (n,) its probability. An image is used if
    its confidence reaches `threshold`; with `per_class`, of those only so many of each predicted
    class, the most confident (Yalniz et al., arXiv 1905.00546, section 3), so that no class drowns
    the others. Ties go to the earlier image.
    """
    used = confidence >= settings.threshold
    if settings.per_class is None:
        return used
    balanced = np.zeros_like(used)
    for label in np.unique(classes[used]):
        members = np.flatnonzero(used & (classes == label))
        order = np.argsort(-confidence[members], kind="stable")
        balanced[members[order[: settings.per_class]]] = True
    return balanced
