"""The ONNX student on plain images, with NumPy and ONNX Runtime only.

This file is copied into every MLflow model that `sbf_dist.tracking` makes, and runs there without
sbf_dist: it must import nothing else. It is also the shortest example of how to use the ONNX file.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime

ROUNDING = 1e-3  # by which floats may lie outside of [0, 1]


class Student:
    """A classifier of RGB images.

    path: an ONNX file that sbf_dist.export.onnx.export_onnx wrote; class names, normalisation and
    image size are read from its metadata. One thread per core unless `threads` says otherwise.
    """

    batch_size = 64  # bounds the memory that a large request takes

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.classes = np.array(json.loads(metadata["sbf.classes"]))
        outputs = [one.name for one in self.session.get_outputs()]
        if "logits" not in outputs:
            raise ValueError(f"{path} is no classifier: it gives {', '.join(outputs)}, no logits")
        self.input_shape = tuple(json.loads(metadata["sbf.input_shape"]))
        mean, std = (json.loads(metadata[key]) for key in ("sbf.mean", "sbf.std"))
        if mean is None or std is None:
            raise ValueError(
                f"{path} does not say how images are normalised: export it with mean and std"
            )
        self.mean = np.array(mean, dtype=np.float32)
        self.std = np.array(std, dtype=np.float32)
        batch = self.session.get_inputs()[0].shape[0]
        if isinstance(batch, int):
            self.batch_size = batch

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
                f"images have shape {images.shape}; wanted (N, {height}, {width}, {channels})"
            )
        if len(images) == 0:
            raise ValueError(f"images have shape {images.shape}; wanted at least one image")
        if images.dtype != np.uint8:
            _check_floats(images)
        logits = [
            self.session.run(["logits"], {"images": self._normalised(part)})[0]
            for part in np.split(images, range(self.batch_size, len(images), self.batch_size))
        ]
        probabilities = _softmax(np.concatenate(logits))
        return {
            "class": self.classes[probabilities.argmax(1)],
            "probability": probabilities.max(1),
            "probabilities": probabilities,
        }

    def _normalised(self, images: np.ndarray) -> np.ndarray:
        values = images.astype(np.float32)
        if images.dtype == np.uint8:
            values /= 255
        return np.ascontiguousarray(((values - self.mean) / self.std).transpose(0, 3, 1, 2))


def _check_floats(images: np.ndarray) -> None:
    """Raise ValueError, in one line, for values that no image has on a scale from 0 to 1."""
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images are {images.dtype}; wanted uint8, or floats in [0, 1]")
    if not np.isfinite(images).all():
        raise ValueError("images hold NaN or infinity; wanted uint8, or floats in [0, 1]")
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


def _load_pyfunc(path: str) -> Student:
    # MLflow calls this name to load the model; it may hand over the file or its folder
    return Student(path)
