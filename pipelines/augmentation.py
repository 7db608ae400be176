"""Random views of training images: the numbers of each sample's view."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.random_numbers import Purpose, uniform_numbers
from sbf_dist.settings import Augmentation

# RandAugment's, in the order that the graph knows (rand_augment.py).
OPERATIONS = (
    "translate_x", "translate_y", "shear_x", "shear_y", "rotate", "brightness", "contrast", "color",
    "sharpness", "posterize", "solarize", "equalize", "auto_contrast", "identity",
)  # fmt: skip
MAGNITUDES = 31


def warps(augmentation: Augmentation) -> bool:
    """Whether views are rotated or moved."""
    return augmentation.rotate > 0 or augmentation.shift > 0


def only_crops(augmentation: Augmentation) -> bool:
    """Whether a view is a resized crop, mirrored perhaps, and nothing else."""
    varies = warps(augmentation) or augmentation.color > 0 or augmentation.rand_augment > 0
    return augmentation.crop == "resized" and not varies


@dataclass(frozen=True)
class Views:
    """The views of b samples, as the training graph wants them.

    anchor, shape   float32 (b, 2): top left corner and size of the crop, (y, x), as shares of the
                    image's height and width (crop="resized")
    start           int32 (b, 2): top left corner, (y, x), of the square in the image whose short
                    side is image_size; pixels, negative in the border (crop="padded")
    mirror          int32 (b,)
    matrix          float32 (b, 2, 3): output (x, y, 1) to input (x, y), in pixels of the output
    color           float32 (b, 3): factors of brightness, contrast, saturation
    operations      int32 (b, rand_augment): positions in OPERATIONS
    signs           int32 (b, rand_augment): 1 where the operation's magnitude is negated
    """

    anchor: NDArray[np.float32]
    shape: NDArray[np.float32]
    start: NDArray[np.int32]
    mirror: NDArray[np.int32]
    matrix: NDArray[np.float32]
    color: NDArray[np.float32]
    operations: NDArray[np.int32]
    signs: NDArray[np.int32]

    def inputs(self, augmentation: Augmentation) -> dict[str, NDArray[Any]]:
        """What the training graph of this augmentation asks for."""
        names = ["anchor", "shape"] if augmentation.crop == "resized" else ["start"]
        names += ["mirror"]
        names += ["matrix"] if warps(augmentation) else []
        names += ["color"] if augmentation.color > 0 else []
        names += ["operations", "signs"] if augmentation.rand_augment else []
        return {name: getattr(self, name) for name in names}


def draw_views(
    augmentation: Augmentation,
    sizes: NDArray[np.int64],
    *,
    image_size: int,
    seed: int,
    position: int,
    strong: bool = False,
) -> Views:
    """The views of the samples at stream positions position … position + len(sizes) − 1.

    `sizes` is (b, 2), height and width in pixels. The numbers are a function of (seed, position)
    alone: the same sample gets the same view whatever the rank, the number of ranks, the batch
    size and however often the run was stopped and resumed. `strong` gives the numbers of a second
    view, independent of the first.
    """
    geometry, choice = (
        (Purpose.STRONG_VIEW, Purpose.STRONG_OPERATIONS)
        if strong
        else (Purpose.VIEW, Purpose.OPERATIONS)
    )
    uniform = uniform_numbers(geometry, seed, position, len(sizes), 12)
    shape = _crop_shapes(augmentation, sizes, uniform[:, 0], uniform[:, 1])
    flip = uniform[:, 4] < (0.5 if augmentation.flip else 0.0)
    signed = 2 * uniform - 1
    count = augmentation.rand_augment
    chosen = uniform_numbers(choice, seed, position, len(sizes), 2 * count)
    return Views(
        anchor=(uniform[:, 2:4] * (1 - shape)).astype(np.float32),
        shape=shape.astype(np.float32),
        start=_padded_starts(augmentation.padding, sizes, uniform[:, 2:4], image_size),
        mirror=flip.astype(np.int32),
        matrix=_warp_matrices(
            np.deg2rad(augmentation.rotate) * signed[:, 5],
            augmentation.shift * image_size * signed[:, 6:8],
            image_size,
        ),
        color=(1 + augmentation.color * signed[:, 8:11]).astype(np.float32),
        operations=(chosen[:, :count] * len(OPERATIONS)).astype(np.int32),
        signs=(chosen[:, count:] < 0.5).astype(np.int32),
    )


def _padded_starts(
    padding: int, sizes: NDArray[np.int64], draw: NDArray[np.float64], image_size: int
) -> NDArray[np.int32]:
    """Corners of the square, uniform over the image and its border, int32 (b, 2)."""
    resized = np.rint(sizes * (image_size / sizes.min(axis=1, keepdims=True))).astype(np.int64)
    places = resized - image_size + 2 * padding + 1
    return (np.floor(draw * places) - padding).astype(np.int32)


def _crop_shapes(
    augmentation: Augmentation,
    sizes: NDArray[np.int64],
    area_draw: NDArray[np.float64],
    ratio_draw: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Relative (height, width) of crops with a random area and aspect ratio, (b, 2) in (0, 1].

    The crops of Szegedy et al. 2015, without torchvision's rejection of crops that do not fit: the
    ratio r is drawn from the part of its range that fits. With the image's ratio R and the area
    share a, relative width √(a r / R) and height √(a R / r) are at most 1 for a R <= r <= R / a.
    Where no ratio of the range fits, the nearest is taken, and the largest crop that has it.
    """
    image_ratio = sizes[:, 1] / sizes[:, 0]
    area = augmentation.min_scale + (augmentation.max_scale - augmentation.min_scale) * area_draw
    low = np.clip(area * image_ratio, augmentation.min_ratio, augmentation.max_ratio)
    high = np.clip(image_ratio / area, augmentation.min_ratio, augmentation.max_ratio)
    ratio = low * (high / low) ** ratio_draw
    shape = np.stack(
        [np.sqrt(area * image_ratio / ratio), np.sqrt(area * ratio / image_ratio)], axis=1
    )
    shape /= np.maximum(1.0, shape.max(axis=1, keepdims=True))
    return np.maximum(shape, 1 / sizes)  # at least one pixel


def _warp_matrices(
    angle: NDArray[np.float64], offset: NDArray[np.float64], image_size: int
) -> NDArray[np.float32]:
    """Matrices (b, 2, 3) that rotate about the image's centre, then move by offset (x, y)."""
    cosine, sine = np.cos(angle), np.sin(angle)
    turn = np.stack([np.stack([cosine, sine], -1), np.stack([-sine, cosine], -1)], axis=1)
    centre = np.full(2, image_size / 2)
    move = centre - np.einsum("bij,bj->bi", turn, centre + offset)
    return np.concatenate([turn, move[:, :, None]], axis=2).astype(np.float32)
