"""RandAugment in a DALI graph, whose operations are inputs instead of drawn by DALI."""

from typing import Any

from nvidia import dali
from nvidia.dali.auto_aug.augmentations import sharpness_kernel
from nvidia.dali.auto_aug.core import augmentation, select, signed_bin
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite

from pipelines.augmentation import MAGNITUDES, OPERATIONS

fn: Any = dali.fn
types: Any = dali.types


# DALI's own two call operators by names that are no longer in use, and warn of that.
@augmentation(
    mag_range=(0, 0.9), randomly_negate=True, mag_to_param=sharpness_kernel, param_device="auto"
)
def sharpness(images: Any, kernel: Any) -> Any:
    return fn.filter(images, kernel)


@augmentation
def equalize(images: Any, _: Any) -> Any:
    return fn.equalize(images)


_OWN_OPERATIONS = {"sharpness": sharpness, "equalize": equalize}


def rand_augmented(
    images: Any, chosen: Any, signs: Any, *, side: int, count: int, magnitude: int
) -> Any:
    """`count` operations one after another on uint8 images (side, side, 3), chosen for each sample.

    chosen, signs are int32 (count,) for each sample: positions in OPERATIONS, and 1 where the
    magnitude is negated. Only in a graph that is built with conditionals. Operations and ranges are
    DALI's: the strength of each grows with the magnitude, 0..30 (Cubuk et al. 2020).
    """
    suite = [_OWN_OPERATIONS.get(one.name, one) for one in get_rand_augment_suite(use_shape=True)]
    assert tuple(one.name for one in suite) == OPERATIONS
    for number in range(count):
        images = select(
            suite,
            chosen[number],
            images,
            magnitude_bin=signed_bin(magnitude, random_sign=signs[number]),
            num_magnitude_bins=MAGNITUDES,
            fill_value=128,
            interp_type=types.INTERP_LINEAR,
            shape=[side, side],
        )
    return images
