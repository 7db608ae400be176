"""The student in this process, by a recipe's settings: made of a dense network, and exported."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from launchers.display import Display
from sbf_dist.compress.budget import Budget
from sbf_dist.compress.latency_table import LatencyTable, default_path
from sbf_dist.compress.plan import Plan
from sbf_dist.compress.reconstruct import compress
from sbf_dist.export.onnx import to_onnx, verify_onnx
from sbf_dist.export.optimize import optimize
from sbf_dist.export.saved import ONNX, Card, save_student
from sbf_dist.recipe import Recipe

LARGEST_ONNX_DIFFERENCE = 1e-4


def make(
    recipe: Recipe,
    dense: nn.Module,
    model_name: str,
    classes: int,
    images: Tensor,
    display: Display,
) -> tuple[nn.Module, Plan]:
    """Plan and fit the student of `dense` within the recipe's budget, and say what it saves."""
    settings = recipe.compress
    student, plan = compress(
        dense,
        images,
        model_name=model_name,
        classes=classes,
        budget=Budget(settings.macs, settings.latency, settings.latency_ms),
        sources=settings.sources,
        transform_size=settings.transform_size,
        floor=settings.floor,
        seed=recipe.seed,
        progress=lambda title, done, of: display.show({"title": title, "step": done, "steps": of}),
        table=LatencyTable(settings.latency_table or default_path(), settings.latency_batch),
        for_inference=optimize,
    )
    display.say(f"  {plan.summary()}")
    return student, plan


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
    to_onnx(student, onnx, card)
    difference = verify_onnx(onnx, student, images)
    if difference > LARGEST_ONNX_DIFFERENCE:
        raise RuntimeError(
            f"{onnx}: differs from the student by {difference:.2e} in the logits of "
            f"{len(images)} images, more than {LARGEST_ONNX_DIFFERENCE:.0e}"
        )
    return difference
