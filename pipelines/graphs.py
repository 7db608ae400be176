"""The DALI graphs: from encoded images to normalised ones, on the CPU or on a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nvidia import dali
from nvidia.dali.pipeline import Pipeline, pipeline_def

from pipelines.augmentation import warps
from pipelines.rand_augment import rand_augmented
from pipelines.reader import Reader
from sbf_dist.settings import Augmentation, View

# DALI's stubs know neither its enumerations nor all of its operators.
fn: Any = dali.fn
types: Any = dali.types

DTYPES = {"float32": types.FLOAT, "float16": types.FLOAT16}
STRONG_PREFIX = "strong_"  # stands before the names of the inputs of the strong view
_LEVELS = 255.0
_MAX_HINT_PIXELS = 4096


@dataclass(frozen=True)
class Form:
    """What goes into a graph and what comes out, apart from the views.

    source      the input that brings the images: "path" (uint8 file names), "encoded" (uint8
                bytes of a file) or "pixels" (uint8 (h, w, 3))
    image_size  side of the square that comes out
    mean, std   of images in [0, 1]
    dtype       "float32" or "float16", of what comes out
    threads     DALI's
    device_id   None means CPU operators; on a GPU, JPEG is decoded by nvJPEG and the hardware
    prefetch    batches in flight
    largest     height and width of the largest image, for which the GPU's decoder sets memory
                aside at once; (0, 0) where that is unknown
    fits        all images are image_size × image_size already
    """

    batch_size: int
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    threads: int
    device_id: int | None
    prefetch: int
    source: str = "path"
    dtype: str = "float32"
    largest: tuple[int, int] = (0, 0)
    fits: bool = False

    @classmethod
    def of(
        cls,
        view: View,
        reader: Reader,
        *,
        batch_size: int,
        source: str,
        largest: tuple[int, int] = (0, 0),
        fits: bool = False,
    ) -> "Form":
        """The form of a reader's batches."""
        return cls(
            batch_size=batch_size,
            image_size=view.image_size,
            mean=view.mean,
            std=view.std,
            threads=reader.threads,
            device_id=reader.device_id,
            prefetch=reader.prefetch,
            source=source,
            dtype=reader.dtype,
            largest=largest,
            fits=fits,
        )


def train_graph(
    form: Form, augmentation: Augmentation, strong: Augmentation | None = None
) -> Pipeline:
    """Decode, crop, resize, vary, normalise: (b, image_size, image_size, 3).

    Inputs, to be fed for each batch: the images as the form's source says, and what Views.inputs
    gives. The graph itself draws no random number. With `strong` the same images come out a second
    time, in a view of its own whose inputs have the prefix STRONG_PREFIX.
    """

    def views() -> tuple[Any, ...]:
        if strong is None and augmentation.crop == "resized" and not _is_whole(form):
            return (_varied(_resized(_cut(form), form), form, augmentation, ""),)
        images = _decoded(form)
        asked = [(augmentation, "")] + ([(strong, STRONG_PREFIX)] if strong is not None else [])
        return tuple(
            _varied(_crops(images, form, one, prefix), form, one, prefix) for one, prefix in asked
        )

    chooses = augmentation.rand_augment > 0 or (strong is not None and strong.rand_augment > 0)
    return _built(form, views, conditionals=chooses)


def crop_graph(form: Form) -> Pipeline:
    """Decode crops (augmentation.crop "resized"), nothing else: uint8 (h, w, 3), of all sizes.

    Inputs: the images, "anchor" and "shape".
    """
    return _built(form, lambda: _sliced(_decoded(form), "") if _is_whole(form) else _cut(form))


def evaluate_graph(form: Form, *, crop: float) -> Pipeline:
    """Resize the short side to image_size / crop, cut the centre out, normalise.

    Output (b, image_size, image_size, 3). As torchvision's Resize (bilinear, antialias),
    CenterCrop, ToTensor and Normalize, up to rounding.
    """

    def images() -> Any:
        short = round(form.image_size / crop)
        resized = fn.resize(_decoded(form), resize_shorter=short, antialias=True)
        return _normalised(resized, form, crop=(form.image_size, form.image_size))

    return _built(form, images)


def decode_graph(form: Form) -> Pipeline:
    """Decode, nothing else: uint8 (h, w, 3), each image of its own size."""
    return _built(form, lambda: _decoded(form))


def _built(form: Form, outputs: Callable[[], Any], *, conditionals: bool = False) -> Pipeline:
    """`conditionals` lets DALI rewrite the Python of the graph, so that it can branch by sample."""
    define = pipeline_def(enable_conditionals=conditionals)(outputs)
    pipe = define(
        batch_size=form.batch_size,
        num_threads=form.threads,
        device_id=form.device_id,
        prefetch_queue_depth=form.prefetch,
    )
    pipe.build()
    return pipe


def _decoded(form: Form) -> Any:
    if form.source == "pixels":
        pixels = fn.external_source(name="pixels", dtype=types.UINT8, ndim=3, layout="HWC")
        return pixels if form.device_id is None else pixels.gpu()
    return fn.decoders.image(_file_bytes(form), **_decoding(form))


def _is_whole(form: Form) -> bool:
    """Whether the images come decoded."""
    return form.source == "pixels"


def _cut(form: Form) -> Any:
    """The crops alone: of a JPEG, what lies outside is neither transformed nor coloured."""
    return fn.decoders.image_slice(
        _file_bytes(form), *_relative_box(""), axis_names="HW", **_decoding(form)
    )


def _sliced(images: Any, prefix: str) -> Any:
    return fn.slice(
        images, *_relative_box(prefix), axis_names="HW", out_of_bounds_policy="trim_to_shape"
    )


def _resized(images: Any, form: Form) -> Any:
    return fn.resize(images, size=[form.image_size, form.image_size], antialias=True)


def _decoding(form: Form) -> dict[str, Any]:
    if form.device_id is None:
        return {"device": "cpu", "output_type": types.RGB}
    height, width = (min(side, _MAX_HINT_PIXELS) for side in form.largest)
    return {
        "device": "mixed",
        "output_type": types.RGB,
        "preallocate_height_hint": height,
        "preallocate_width_hint": width,
    }


def _file_bytes(form: Form) -> Any:
    encoded = fn.external_source(name=form.source, dtype=types.UINT8, ndim=1)
    if form.source == "encoded":
        return encoded
    # Without mmap: a file that shrinks under a map kills the process with SIGBUS.
    return fn.io.file.read(encoded, dont_use_mmap=True)


def _relative_box(prefix: str) -> tuple[Any, Any]:
    return (
        fn.external_source(name=f"{prefix}anchor", dtype=types.FLOAT, ndim=1),
        fn.external_source(name=f"{prefix}shape", dtype=types.FLOAT, ndim=1),
    )


def _crops(images: Any, form: Form, augmentation: Augmentation, prefix: str) -> Any:
    """The square of a view, out of whole images."""
    if augmentation.crop == "resized":
        return _resized(_sliced(images, prefix), form)
    if not form.fits:
        images = fn.resize(images, resize_shorter=form.image_size, antialias=True)
    return fn.slice(
        images,
        start=fn.external_source(name=f"{prefix}start", dtype=types.INT32, ndim=1),
        shape=[form.image_size, form.image_size],
        axis_names="HW",
        out_of_bounds_policy="pad",
        fill_values=0,
    )


def _varied(images: Any, form: Form, augmentation: Augmentation, prefix: str) -> Any:
    """From square to view: what the augmentation asks for, then normalised and mirrored."""
    if warps(augmentation):
        images = fn.warp_affine(
            images,
            matrix=fn.external_source(name=f"{prefix}matrix", dtype=types.FLOAT, ndim=2),
            interp_type=types.INTERP_LINEAR,
        )
    if augmentation.color > 0:
        factors = fn.external_source(name=f"{prefix}color", dtype=types.FLOAT, ndim=1)
        images = fn.color_twist(
            images, brightness=factors[0], contrast=factors[1], saturation=factors[2]
        )
    if augmentation.rand_augment:
        images = rand_augmented(
            images,
            fn.external_source(name=f"{prefix}operations", dtype=types.INT32, ndim=1),
            fn.external_source(name=f"{prefix}signs", dtype=types.INT32, ndim=1),
            side=form.image_size,
            count=augmentation.rand_augment,
            magnitude=augmentation.magnitude,
        )
    mirror = fn.external_source(name=f"{prefix}mirror", dtype=types.INT32, ndim=0)
    return _normalised(images, form, mirror=mirror)


def _normalised(images: Any, form: Form, **arguments: Any) -> Any:
    return fn.crop_mirror_normalize(
        images,
        mean=[_LEVELS * value for value in form.mean],
        std=[_LEVELS * value for value in form.std],
        dtype=DTYPES[form.dtype],
        output_layout="HWC",
        **arguments,
    )
