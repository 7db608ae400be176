"""The student in this process: compressed from a dense network, and exported."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launchers.display import Display
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.likeness import UnlikeImages
from sbf_dist.compression.named_outputs import named_tensors
from sbf_dist.compression.one_shot import compress
from sbf_dist.compression.plan import MeasuredFidelity, Plan
from sbf_dist.compression.planning.latency_table import LatencyTable, Timing, default_path
from sbf_dist.compression.progress import Progress
from sbf_dist.errors import UserError
from sbf_dist.export.onnx import export_onnx, verify_onnx
from sbf_dist.export.optimize import optimize
from sbf_dist.export.saved import Card, save_student
from sbf_dist.export.student_files import ONNX
from sbf_dist.models import Architecture
from sbf_dist.recipe import Data, OneShotCompression

MAX_ONNX_DIFFERENCE = 1e-4  # of outputs, or of the largest where that is above 1
NUM_VERIFIED_IMAGES = 64  # on which the exported network is compared


def make_student(
    dense: nn.Module,
    images: Calibration,
    settings: OneShotCompression,
    architecture: Architecture,
    seed: int,
    display: Display,
) -> tuple[nn.Module, Plan]:
    """Plan and fit the student of `dense` within the settings' budget, and say what it saves.

    `architecture`: what `dense` was built of.
    """
    table = LatencyTable(settings.latency_table or default_path(), settings.latency_batch)
    with _warnings_on(display):
        student, plan = compress(
            dense,
            images,
            settings,
            name=architecture,
            seed=seed,
            progress=progress_of(display),
            timing=Timing(table, optimize),
        )
    display.say(f"  {plan.summary()}")
    return student, plan


@contextmanager
def _warnings_on(display: Display) -> Iterator[None]:
    """Print warnings of images that a network does not know as lines of `display`."""
    elsewhere = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, UnlikeImages):
            display.say(f"  warning: {message}")
        else:
            elsewhere(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UnlikeImages)
        warnings.showwarning = show
        yield


def progress_of(display: Display) -> Progress:
    """Return what shows on `display` how far the planner is."""
    return lambda title, done, of: display.show({"title": title, "step": done, "steps": of})


def export_student(
    folder: Path,
    student: nn.Module,
    plan: Plan,
    data: Data,
    *,
    classes: Sequence[str],
    top1: float | None,
    fidelity: MeasuredFidelity | None,
    images: Tensor,
) -> float:
    """Write `student` to `folder` as safetensors + plan and as ONNX; how far their outputs differ.

    RuntimeError if ONNX Runtime differs from PyTorch by more than MAX_ONNX_DIFFERENCE on `images`.
    """
    card = Card.of(
        plan,
        classes=list(classes),
        mean=list(data.mean),
        std=list(data.std),
        crop=data.crop,
        top1=top1,
        fidelity=fidelity,
    )
    save_student(folder, student, plan, card)
    onnx = folder / ONNX
    export_onnx(student, onnx, card)
    difference = verify_onnx(onnx, student, images)
    with torch.inference_mode():
        largest = [t.abs().max().item() for t in named_tensors(student(images[:2])).values()]
    if not all(map(math.isfinite, largest)):
        raise UserError(f"student {folder}: its outputs for {len(images)} images are not finite")
    if not difference <= MAX_ONNX_DIFFERENCE * max(1.0, *largest):
        raise RuntimeError(
            f"{onnx}: differs from the student by {difference:.2e} in the outputs for "
            f"{len(images)} images, more than {MAX_ONNX_DIFFERENCE:.0e}"
        )
    return difference
