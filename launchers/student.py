"""The student in this process, by a recipe's settings: made of a dense network, and exported."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from launchers.display import Display
from sbf_dist.budget import Budget
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.joint import SHARES, RemovalSettings, plan_jointly
from sbf_dist.compression.plan import Plan
from sbf_dist.compression.planning.latency_table import LatencyTable, default_path
from sbf_dist.compression.progress import Progress
from sbf_dist.compression.reconstruct import compress
from sbf_dist.compression.removal.probe import Probe
from sbf_dist.export.onnx import export_onnx, verify_onnx
from sbf_dist.export.optimize import optimize
from sbf_dist.export.saved import ONNX, Card, save_student
from sbf_dist.recipe import Compress, Recipe

LARGEST_ONNX_DIFFERENCE = 1e-4
VERIFIED_IMAGES = 64  # on which the exported network is compared


def make(
    recipe: Recipe,
    dense: nn.Module,
    model_name: str,
    classes: int,
    images: Calibration,
    display: Display,
) -> tuple[nn.Module, Plan]:
    """Plan and fit the student of `dense` within the recipe's budget, and say what it saves."""
    settings = recipe.compress
    arguments: dict[str, Any] = {
        "model_name": model_name,
        "classes": classes,
        "budget": budget_of(settings),
        "seed": recipe.seed,
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


def budget_of(settings: Compress) -> Budget:
    """Return the budget that a recipe gives."""
    return Budget(
        macs=settings.macs,
        params=settings.params,
        latency=settings.latency,
        latency_ms=settings.latency_ms,
    )


def progress_of(display: Display) -> Progress:
    """Return what tells `display` how far the planner is."""
    return lambda title, done, of: display.show({"title": title, "step": done, "steps": of})


def export(
    folder: Path,
    student: nn.Module,
    plan: Plan,
    recipe: Recipe,
    *,
    classes: Sequence[str],
    top1: float | None,
    images: Tensor,
) -> float:
    """Write `student` to `folder` as safetensors + plan and as ONNX; how far their logits differ.

    RuntimeError if ONNX Runtime differs from PyTorch by more than LARGEST_ONNX_DIFFERENCE on
    `images`.
    """
    data = recipe.data
    card = Card.of(plan, classes=list(classes), mean=list(data.mean), std=list(data.std), top1=top1)
    save_student(folder, student, plan, card)
    onnx = folder / ONNX
    export_onnx(student, onnx, card)
    difference = verify_onnx(onnx, student, images)
    if difference > LARGEST_ONNX_DIFFERENCE:
        raise RuntimeError(
            f"{onnx}: differs from the student by {difference:.2e} in the logits of "
            f"{len(images)} images, more than {LARGEST_ONNX_DIFFERENCE:.0e}"
        )
    return difference
