"""The forms in which a student leaves the project: each written, and opened again."""

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.utils.benchmark import Timer

from launchers.display import Display
from launchers.images import evaluation_images
from launchers.labelled_images import Images
from launchers.machine import available_cpus
from sbf_dist.compression.named_outputs import named_tensors
from sbf_dist.compression.plan import Plan
from sbf_dist.export import exported_program, int8, onnx, sbf_student
from sbf_dist.export.model_card import History
from sbf_dist.export.saved import Card, load_student, save_student
from sbf_dist.export.student_files import EXPORTED_PROGRAM, ONNX, WEIGHTS
from sbf_dist.surgery import deep_copy
from sbf_dist.tracking import model as mlflow_model

CALIBRATED = 256  # images that ranges of activations are measured on
_BATCH = 32
_MLFLOW_DATA = "data"  # folder of the files of an MLflow model
_MLFLOW_TOLERANCE = 1e-4  # of probabilities, which come as JSON would give them

Outputs = list[NDArray[np.float32]]
# From normalised images, float32 (N, 3, H, W), to all outputs.
Run = Callable[[NDArray[np.float32]], Outputs]


@dataclass(frozen=True)
class Student:
    """What is exported, and what it is judged on.

    history   how a run made it; None if that is not known
    images    None where none are known
    compared  normalised images (N, 3, H, W); noise where no images are known
    build     see `load_student`
    """

    module: nn.Module
    plan: Plan
    card: Card
    history: History | None
    images: Images | None
    compared: NDArray[np.float32]
    build: str | None = None

    @property
    def is_classifier(self) -> bool:
        return bool(self.card.classes)

    def run(self, images: NDArray[np.float32]) -> Outputs:
        """Return its outputs in PyTorch."""
        return _run_module(self.module, images)


@dataclass(frozen=True)
class Written:
    """A file as it answers when it is opened again.

    timer  of one image; None if it is no program
    """

    path: Path
    run: Run
    timer: Timer | None


def _onnx(student: Student, precision: str, folder: Path, display: Display) -> Written:
    path = folder / ONNX
    with tempfile.TemporaryDirectory() as aside:
        in_fp32 = path if precision == "fp32" else Path(aside) / ONNX
        onnx.export_onnx(student.module, in_fp32, student.card)
        if precision == "fp16":
            onnx.halve_onnx(in_fp32, path)
        if precision == "int8":
            _quantise(student, in_fp32, path, display)
    return _opened(student, path)


def _quantise(student: Student, source: Path, target: Path, display: Display) -> None:
    images = student.images
    assert images is not None
    drawn = np.random.default_rng(0).permutation(images.training)[:CALIBRATED]
    pixels = evaluation_images(images.data, images.index, np.sort(drawn)).contiguous().numpy()
    found = int8.quantise_onnx(
        source,
        target,
        calibration=np.split(pixels, range(_BATCH, len(pixels), _BATCH)),
        held_out=student.compared,
        progress=lambda title, step, of: display.show({"title": title, "step": step, "steps": of}),
    )
    for layer in found.left_float:
        display.say(
            f"  {layer.name} stays in float ({layer.form}): in int8 alone, predictions diverge by "
            f"{layer.divergence:.2g}"
        )
    display.say(
        f"  {found.layers - len(found.left_float)} of {found.layers} layers are in int8; ranges "
        f"from {len(pixels)} images"
    )


def _program(student: Student, precision: str, folder: Path, _display: Display) -> Written:
    path = folder / EXPORTED_PROGRAM
    half = precision == "fp16"
    exported_program.export_program(student.module, path, student.card, half=half)
    module, _ = exported_program.load_program(path)
    run = partial(_run_module, module, half=half)
    return Written(path, run, _timer(student, run))


def _weights(student: Student, precision: str, folder: Path, _display: Display) -> Written:
    module = student.module
    if precision == "fp16":
        module = deep_copy(module).half()
    save_student(folder, module, student.plan, student.card)
    loaded = load_student(folder, student.build)
    return Written(folder / WEIGHTS, partial(_run_module, loaded), None)


def _mlflow(student: Student, precision: str, folder: Path, display: Display) -> Written:
    with tempfile.TemporaryDirectory() as aside:
        written = _onnx(student, precision, Path(aside), display)
        mlflow_model.save_student(written.path, folder)
    path = folder / _MLFLOW_DATA / ONNX
    _check_mlflow(path, folder)
    return _opened(student, path)


FORMS: dict[str, Callable[[Student, str, Path, Display], Written]] = {
    "onnx": _onnx,
    "torch-export": _program,
    "safetensors": _weights,
    "mlflow": _mlflow,
}


def _check_mlflow(onnx_file: Path, folder: Path) -> None:
    """RuntimeError if MLflow's model answers two pictures otherwise than the file in it."""
    alone = sbf_student.Student(onnx_file)
    _, height, width = alone.input_shape
    pictures = []
    for seed in (0, 1):
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (2 * height, 3 * width, 3), np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        pictures.append(file.getvalue())
    wanted = alone.predict(np.stack([alone.read(picture) for picture in pictures]))
    found = np.array(mlflow_model.answers(folder, pictures))
    difference = float(np.abs(found - wanted["probabilities"]).max())
    if not difference <= _MLFLOW_TOLERANCE:
        raise RuntimeError(f"MLflow's model differs from {ONNX} in it by {difference:.2e}")


def _opened(student: Student, onnx_file: Path) -> Written:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cpus()
    session = onnxruntime.InferenceSession(onnx_file, options, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()

    def run(batch: NDArray[np.float32]) -> Outputs:
        return session.run(None, {images.name: batch})

    return Written(onnx_file, run, _timer(student, run))


def _run_module(module: nn.Module, images: NDArray[np.float32], *, half: bool = False) -> Outputs:
    batch = torch.from_numpy(images)
    with torch.inference_mode():
        outputs = named_tensors(module(batch.half() if half else batch))
    return [output.float().numpy() for output in outputs.values()]


def _timer(student: Student, run: Run) -> Timer:
    return Timer(
        "run(image)",
        globals={"run": run, "image": student.compared[:1]},
        num_threads=torch.get_num_threads(),
    )
