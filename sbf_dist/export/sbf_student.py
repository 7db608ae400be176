"""The ONNX student on pictures, with NumPy, Pillow and ONNX Runtime only.

This file is copied into every MLflow model that `sbf_dist.tracking` makes, and runs there without
sbf_dist: it must import nothing else. It is also the shortest example of how to use the ONNX file.
"""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

ROUNDING = 1e-3  # by which floats may lie outside of [0, 1]
MAX_PIXELS = 64_000_000  # of a picture; decoded, it takes 192 MB
DEFAULT_CROP = 0.875  # where the file does not say what it was evaluated with


class Student:
    """A classifier of RGB images.

    path: an ONNX file that sbf_dist.export.onnx.export_onnx wrote; class names, normalisation and
    image size are read from its metadata. One thread per core unless `threads` says otherwise.

    classes      names, in the order of the logits
    input_shape  channels, height, width
    crop         side of the centre crop that the network sees, share of a picture's short side;
                 None where the file does not say it

    Raises ValueError, in one line, for a file that is no classifier of this kind.
    """

    batch_size = 64  # bounds the memory that a large request takes

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        metadata = self.session.get_modelmeta().custom_metadata_map
        missing = [key for key in ("sbf.classes", "sbf.input_shape") if key not in metadata]
        if missing:
            raise ValueError(
                f"{path} is not an exported student: it has no {missing[0]} in its metadata"
            )
        self.classes = np.array(json.loads(metadata["sbf.classes"]))
        outputs = [one.name for one in self.session.get_outputs()]
        if "logits" not in outputs:
            raise ValueError(
                f"{path} is not a classifier: it gives {', '.join(outputs)}, no logits"
            )
        self.input_shape = tuple(json.loads(metadata["sbf.input_shape"]))
        self.crop = json.loads(metadata.get("sbf.crop", "null"))
        mean, std = (json.loads(metadata.get(key, "null")) for key in ("sbf.mean", "sbf.std"))
        if mean is None or std is None:
            raise ValueError(
                f"{path} does not say how images are normalised: export it with mean and std"
            )
        self.mean = np.array(mean, dtype=np.float32)
        self.std = np.array(std, dtype=np.float32)
        batch = self.session.get_inputs()[0].shape[0]
        if isinstance(batch, int):
            self.batch_size = batch

    def read(self, picture: str | Path | bytes) -> np.ndarray:
        """Return what the network sees of a picture, a file or its content: uint8 (h, w, 3).

        As in the evaluation, see `centre_crop`. Raises ValueError, in one line, if it is not
        readable.
        """
        _, height, width = self.input_shape
        crop = DEFAULT_CROP if self.crop is None else self.crop
        return centre_crop(_opened(picture), height, width, crop)

    def predict(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Classify images (N, height, width, 3): uint8, or floats in [0, 1].

        Returns "class" (N,) names, "probability" (N,) of that class, and "probabilities"
        (N, classes) in the order of `self.classes`. Raises ValueError, in one line, for another
        shape or type, no images, and floats that are not finite or not in [0, 1].
        """
        images = np.asarray(images)
        channels, height, width = self.input_shape
        if images.ndim != 4 or images.shape[1:] != (height, width, channels):
            raise ValueError(
                f"images have shape {images.shape}; expected (N, {height}, {width}, {channels})"
            )
        if len(images) == 0:
            raise ValueError(f"images have shape {images.shape}; expected at least one image")
        if images.dtype != np.uint8:
            _check_floats(images)
        parts = np.split(images, range(self.batch_size, len(images), self.batch_size))
        logits = [self.logits(self._normalised(part)) for part in parts]
        probabilities = _softmax(np.concatenate(logits))
        return {
            "class": self.classes[probabilities.argmax(1)],
            "probability": probabilities.max(1),
            "probabilities": probabilities,
        }

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Return the logits (N, classes) of normalised images, float32 (N, 3, height, width)."""
        return self.session.run(["logits"], {"images": images})[0]

    def _normalised(self, images: np.ndarray) -> np.ndarray:
        values = images.astype(np.float32)
        if images.dtype == np.uint8:
            values /= 255
        return np.ascontiguousarray(((values - self.mean) / self.std).transpose(0, 3, 1, 2))


def _check_floats(images: np.ndarray) -> None:
    """Raise ValueError, in one line, for values that no image has on a scale from 0 to 1."""
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images are {images.dtype}; expected uint8, or floats in [0, 1]")
    if not np.isfinite(images).all():
        raise ValueError("images hold NaN or infinity; expected uint8, or floats in [0, 1]")
    low, high = float(images.min()), float(images.max())
    if low >= -ROUNDING and high <= 1 + ROUNDING:
        return
    guess = "values from 0 to 255 are wanted as uint8"
    if low < -ROUNDING:
        guess = "if they are normalised, leave that to predict"
    raise ValueError(f"images are floats in [{low:.3g}, {high:.3g}], not in [0, 1]: {guess}")


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def centre_crop(picture: Image.Image, height: int, width: int, crop: float) -> np.ndarray:
    """Resize the short side to height / crop, cut the centre out: uint8 (height, width, 3).

    What DALI gives in the evaluation, within one level of 255: bilinear with antialias, sides
    rounded to whole pixels about the centre, and beyond the border the pixel of the border.
    """
    scale = max(round(height / crop) / picture.height, round(width / crop) / picture.width)
    reach = max(1 / scale, 1.0)  # of the filter, pixels of the picture
    (left, before, after), (top, above, below) = (
        _span(length, side, scale, reach)
        for length, side in ((picture.width, width), (picture.height, height))
    )
    x, y = math.floor(left - reach), math.floor(top - reach)
    cut = picture.crop(
        (
            max(x, 0),
            max(y, 0),
            min(math.ceil(left + width / scale + reach), picture.width),
            min(math.ceil(top + height / scale + reach), picture.height),
        )
    )
    pixels = np.pad(np.asarray(cut), ((above, below), (before, after), (0, 0)), "edge")
    box = (left - x, top - y, left - x + width / scale, top - y + height / scale)
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)


def _span(length: int, side: int, scale: float, reach: float) -> tuple[float, int, int]:
    """Where a crop of `side` begins in a picture's side of `length` pixels.

    And how many pixels are missing before and after it for the filter.
    """
    resized = math.floor(length * scale + 0.5)
    offset = math.floor((resized - side) / 2 + 0.5)
    start = (length - resized / scale) / 2 + offset / scale
    start = min(max(start, 0.0), length - side / scale)
    before = max(0, -math.floor(start - reach))
    return start, before, max(0, math.ceil(start + side / scale + reach) - length)


def _opened(picture: str | Path | bytes) -> Image.Image:
    """Decode a picture as RGB, upright. Raises ValueError, in one line, if that is not possible."""
    source: Any = io.BytesIO(picture) if isinstance(picture, bytes) else Path(picture)
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise ValueError("not a regular file")  # opening a pipe would wait for somebody to write
    try:
        with Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits
                levels = np.rint(np.asarray(upright) / 257).astype(np.uint8)
                upright = Image.fromarray(levels)
            return upright.convert("RGB")
    except FileNotFoundError:
        raise ValueError("does not exist") from None
    except Image.UnidentifiedImageError:  # its message names an object of Python's
        raise ValueError("not a readable image (unknown format)") from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"more than the limit of {MAX_PIXELS // 1_000_000} million pixels"
        ) from None
    except Exception as error:  # Pillow raises whatever its parsers stumble over
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"not a readable image ({' '.join(str(reason).split())})") from error


class Service:
    """The student as MLflow calls it: from encoded pictures to classes.

    The input is a table with a column "image": the content of a file in each row, JPEG, PNG or what
    else Pillow reads. The answer has a row for each: "class", "probability", and "probabilities"
    in the order of the classes. Raises ValueError, in one line that names the row, for a picture
    that is not readable.
    """

    def __init__(self, student: Student) -> None:
        self.student = student

    def predict(self, table: Any, params: dict[str, Any] | None = None) -> Any:
        """Classify the pictures of a table (pandas.DataFrame); there are no `params`."""
        import pandas as pd

        images = []
        for row, content in enumerate(table["image"]):
            try:
                images.append(self.student.read(bytes(content)))
            except ValueError as error:
                raise ValueError(f"image in row {row}: {error}") from error
        found = self.student.predict(np.stack(images))
        probabilities = found["probabilities"].astype(float).tolist()
        return pd.DataFrame(
            {
                "class": found["class"].tolist(),
                "probability": found["probability"].astype(float),
                "probabilities": probabilities,
            }
        )


def _load_pyfunc(path: str) -> Service:
    # MLflow calls this name to load the model; it may hand over the file or its folder
    return Service(Student(path))
