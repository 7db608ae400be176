"""The student in this process: compressed from a dense network, and exported."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launchers.display import Display
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.joint import SHARES, RemovalSettings, plan_jointly
from sbf_dist.compression.plan import Plan
from sbf_dist.compression.planning.latency_table import LatencyTable, default_path
from sbf_dist.compression.progress import Progress
from sbf_dist.compression.reconstruct import compress
from sbf_dist.compression.removal.probe import Probe
from sbf_dist.export.onnx import to_onnx, verify_onnx
from sbf_dist.export.optimize import optimize
from sbf_dist.export.saved import ONNX, Card, save_student
from sbf_dist.recipe import Data, OneShotCompression

MAX_ONNX_DIFFERENCE = 1e-4  # of logits
NUM_VERIFIED_IMAGES = 64  # on which the exported network is compared


def make_student(
    dense: nn.Module,
    images: Calibration,
    settings: OneShotCompression,
    model: str,
    seed: int,
    display: Display,
) -> tuple[nn.Module, Plan]:
    """Plan and fit the student of `dense` within the settings' budget, and say what it saves.

    `model`: the name of its architecture, as sbf_dist.models.build takes it.
    """
    with torch.no_grad():
        classes = dense.eval()(images.first(1)).shape[1]
    arguments: dict[str, Any] = {
        "model_name": model,
        "classes": classes,
        "budget": settings.budget,
        "seed": seed,
        "progress": progress_of(display),
        "criterion": settings.criterion,
        "keep": settings.keep,
        "round_to": settings.round_to,
        "between": settings.between,
        "sources": settings.sources,
        "mixtures": settings.mixtures,
        "transform_size": settings.transform_size,
        "floor": settings.floor,
        "refit": settings.refit,
    }
    if settings.removal == 0:
        table = LatencyTable(settings.latency_table or default_path(), settings.latency_batch)
        student, plan = compress(dense, images, **arguments, table=table, for_inference=optimize)
    else:
        student, plan = plan_jointly(
            dense,
            images,
            **arguments,
            shares=SHARES if settings.removal == "auto" else [settings.removal],
            probe=Probe(steps=settings.probe_steps if settings.removal == "auto" else 0),
            removal=RemovalSettings(
                floor=settings.floor, keep=tuple(settings.keep), round_to=settings.round_to
            ),
        )
    display.say(f"  {plan.summary()}")
    return student, plan


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
    images: Tensor,
) -> float:
    """Write `student` to `folder` as safetensors + plan and as ONNX; how far their logits differ.

    RuntimeError if ONNX Runtime differs from PyTorch by more than MAX_ONNX_DIFFERENCE on `images`.
    """
    card = Card.of(plan, classes=list(classes), mean=list(data.mean), std=list(data.std), top1=top1)
    save_student(folder, student, plan, card)
    onnx = folder / ONNX
    to_onnx(student, onnx, card)
    difference = verify_onnx(onnx, student, images)
    if difference > MAX_ONNX_DIFFERENCE:
        raise RuntimeError(
            f"{onnx}: differs from the student by {difference:.2e} in the logits of "
            f"{len(images)} images, more than {MAX_ONNX_DIFFERENCE:.0e}"
        )
    return difference
