"""The DALI graphs: from file names to normalised images, on the CPU or on a GPU."""

from collections.abc import Sequence
from typing import Any

from nvidia import dali
from nvidia.dali.pipeline import Pipeline

from pipelines.augmentation import Augmentation

# DALI's stubs know neither its enumerations nor all of its operators.
fn: Any = dali.fn
types: Any = dali.types

_LEVELS = 255.0


def train_graph(
    *,
    batch_size: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: Augmentation,
    threads: int,
    device_id: int | None,
    prefetch: int,
) -> Pipeline:
    """Decode the crop, resize it, vary it, normalise: float32 (b, image_size, image_size, 3).

    Inputs, to be fed for each batch: "path" (uint8 file names), "anchor", "shape", "mirror", and,
    where the augmentation has use for them, "matrix" and "color" (see augmentation.Views). The
    graph itself draws no random number. mean and std are those of images in [0, 1].
    device_id None means CPU operators; on a GPU, JPEG is decoded by nvJPEG ("mixed").
    """
    pipe = Pipeline(batch_size, threads, device_id, prefetch_queue_depth=prefetch)
    with pipe:
        images = fn.decoders.image_slice(
            _file_bytes(),
            fn.external_source(name="anchor", dtype=types.FLOAT, ndim=1),
            fn.external_source(name="shape", dtype=types.FLOAT, ndim=1),
            axis_names="HW",
            device=_decode_device(device_id),
            output_type=types.RGB,
        )
        images = fn.resize(images, size=[image_size, image_size], antialias=True)
        if augmentation.warps:
            images = fn.warp_affine(
                images,
                matrix=fn.external_source(name="matrix", dtype=types.FLOAT, ndim=2),
                interp_type=types.INTERP_LINEAR,
            )
        if augmentation.color > 0:
            factors = fn.external_source(name="color", dtype=types.FLOAT, ndim=1)
            images = fn.color_twist(
                images, brightness=factors[0], contrast=factors[1], saturation=factors[2]
            )
        mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
        pipe.set_outputs(_normalised(images, mean, std, mirror=mirror))
    pipe.build()
    return pipe


def evaluate_graph(
    *,
    batch_size: int,
    image_size: int,
    crop: float,
    mean: Sequence[float],
    std: Sequence[float],
    threads: int,
    device_id: int | None,
    prefetch: int,
) -> Pipeline:
    """Resize the short side to image_size / crop, cut the centre out, normalise.

    Input "path" (uint8 file names); output float32 (b, image_size, image_size, 3). As torchvision's
    Resize (bilinear, antialias), CenterCrop, ToTensor and Normalize, up to rounding.
    """
    pipe = Pipeline(batch_size, threads, device_id, prefetch_queue_depth=prefetch)
    with pipe:
        images = fn.decoders.image(
            _file_bytes(), device=_decode_device(device_id), output_type=types.RGB
        )
        images = fn.resize(images, resize_shorter=round(image_size / crop), antialias=True)
        pipe.set_outputs(_normalised(images, mean, std, crop=(image_size, image_size)))
    pipe.build()
    return pipe


def _decode_device(device_id: int | None) -> str:
    return "cpu" if device_id is None else "mixed"


def _file_bytes() -> Any:
    path = fn.external_source(name="path", dtype=types.UINT8, ndim=1)
    # Without mmap: a file that shrinks under a map kills the process with SIGBUS.
    return fn.io.file.read(path, dont_use_mmap=True)


def _normalised(images: Any, mean: Sequence[float], std: Sequence[float], **arguments: Any) -> Any:
    return fn.crop_mirror_normalize(
        images,
        mean=[_LEVELS * value for value in mean],
        std=[_LEVELS * value for value in std],
        dtype=types.FLOAT,
        output_layout="HWC",
        **arguments,
    )
