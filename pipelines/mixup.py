"""Which images mixup and cutmix combine, and how, as numbers that the batch carries.

The images are combined where the batch is used, by sbf_dist.distill.mixup.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from pipelines.random_numbers import Purpose, uniform_numbers
from sbf_dist.settings import Augmentation


def draw_mixup(
    augmentation: Augmentation, *, batch_size: int, image_size: int, seed: int, position: int
) -> dict[str, NDArray[Any]]:
    """How the samples at stream positions position … position + batch_size − 1 are combined.

    mixup_partner   int64 (b,): place in the batch of the other image. It is the neighbour in the
                    stream, 2k and 2k + 1 being a pair, so that batches of any even size, on any
                    number of ranks, combine the same images in the same way
    mixup_share     float32 (b,): the share of the image itself, and of its label
    mixup_box       int64 (b, 4), where there is cutmix: top, left, bottom, right of the box that
                    shows the partner, pixels; all 0 where the two are blended
    """
    drawn = uniform_numbers(Purpose.MIXUP, seed, position, batch_size, 4)
    both = augmentation.mixup > 0 and augmentation.cutmix > 0
    cuts = drawn[:, 0] < (0.5 if both else float(augmentation.cutmix > 0))
    alpha = np.where(cuts, augmentation.cutmix, augmentation.mixup)
    share = betaincinv(alpha, alpha, drawn[:, 1])  # the inverse of Beta's distribution function
    combined = {
        "mixup_partner": np.arange(batch_size) ^ 1,
        "mixup_share": share.astype(np.float32),
    }
    if augmentation.cutmix > 0:
        box = _boxes(np.sqrt(1 - share), drawn[:, 2:], image_size)
        box[~cuts] = 0
        area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
        # The box may reach over the border: the share is that of what is seen.
        combined["mixup_share"] = np.where(cuts, 1 - area / image_size**2, share).astype(np.float32)
        combined["mixup_box"] = box
    return combined


def _boxes(
    side: NDArray[np.float64], centre: NDArray[np.float64], image_size: int
) -> NDArray[np.int64]:
    """Squares of the relative side, clipped to the image, (b, 4)."""
    middle = np.floor(centre * image_size)
    half = np.floor(side * image_size)[:, None] / 2
    edges = np.concatenate([np.floor(middle - half), np.floor(middle + half)], axis=1)
    return edges.clip(0, image_size).astype(np.int64)
