"""Random views: what the settings mean, and the numbers of each sample's view."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.random_numbers import Purpose, uniform_numbers
from sbf_dist.errors import UserError

# RandAugment's, in the order that the graph knows (rand_augment.py).
OPERATIONS = (
    "translate_x", "translate_y", "shear_x", "shear_y", "rotate", "brightness", "contrast", "color",
    "sharpness", "posterize", "solarize", "equalize", "auto_contrast", "identity",
)  # fmt: skip
MAGNITUDES = 31


@dataclass(frozen=True)
class Augmentation:
    """How a training image is varied. The defaults suit photographs.

    Digits and other signs: flip=False, min_scale about 0.7, a few degrees of `rotate`, `shift`
    0.05 to 0.1. CIFAR: crop="padded".

    crop                   "resized": a crop of random area and aspect ratio, resized to the
                           square (Szegedy et al. 2015). "padded": the image, its short side
                           resized to the square's, with a black border, and a square cut out of
                           that at random (He et al. 2016, on CIFAR)
    padding                crop="padded": width of the border, pixels
    min_scale, max_scale   the crop's share of the image's area is uniform in [min, max]; (0, 1]
    min_ratio, max_ratio   the crop's width/height is log-uniform in [min, max], as far as the crop
                           fits into the image; > 0
    flip                   mirror left and right with probability 1/2
    rotate                 rotate the crop by an angle uniform in [−rotate, rotate]; degrees, 0..180
    shift                  move the crop, each way, by a share of its side, uniform in
                           [−shift, shift]; [0, 1]
    color                  factors of brightness, contrast and saturation, each uniform in
                           [1 − color, 1 + color]; [0, 1]
    rand_augment           so many random operations one after another (RandAugment, Cubuk et al.
                           2020, whose 14 operations these are, as DALI has them); 0: none
    magnitude              strength of these operations, 0..30
    mixup                  blend each image with another, labels too: the share is drawn from
                           Beta(mixup, mixup) (Zhang et al. 2018); 0: none
    cutmix                 put a box out of another image into each, its area drawn from
                           Beta(cutmix, cutmix) (Yun et al. 2019); 0: none. With mixup: one or the
                           other, half of the time each
    min_scale to max_ratio are those of crop="resized". What rotation and shift uncover is filled
    with the nearest pixel of the border. UserError for a value out of its range.
    """

    crop: str = "resized"
    padding: int = 4
    min_scale: float = 0.35
    max_scale: float = 1.0
    min_ratio: float = 3 / 4
    max_ratio: float = 4 / 3
    flip: bool = True
    rotate: float = 0.0
    shift: float = 0.0
    color: float = 0.0
    rand_augment: int = 0
    magnitude: int = 9
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= self.max_scale <= 1:
            raise UserError(
                f"augmentation: min_scale {self.min_scale} and max_scale {self.max_scale} must be "
                "0 < min_scale <= max_scale <= 1"
            )
        if not 0 < self.min_ratio <= self.max_ratio < math.inf:
            raise UserError(
                f"augmentation: min_ratio {self.min_ratio} and max_ratio {self.max_ratio} must be "
                "0 < min_ratio <= max_ratio"
            )
        if self.crop not in ("resized", "padded"):
            raise UserError(f"augmentation: crop {self.crop!r} must be resized or padded")
        limits = {
            "padding": 1024, "rotate": 180, "shift": 1, "color": 1, "rand_augment": 16,
            "magnitude": MAGNITUDES - 1, "mixup": 1000, "cutmix": 1000,
        }  # fmt: skip
        for name, limit in limits.items():
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise UserError(f"augmentation: {name} {value} must be in 0..{limit}")

    @property
    def warps(self) -> bool:
        return self.rotate > 0 or self.shift > 0

    @property
    def only_crops(self) -> bool:
        """Whether a view is a resized crop, mirrored perhaps, and nothing else."""
        varies = self.warps or self.color > 0 or self.rand_augment > 0
        return self.crop == "resized" and not varies

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


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
        names += ["matrix"] if augmentation.warps else []
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
