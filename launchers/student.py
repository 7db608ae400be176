"""The student in this process, by a recipe's settings: made of a dense network, and exported."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from launchers.display import Display
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.one_shot import compress
from sbf_dist.compression.plan import Plan
from sbf_dist.compression.planning.latency_table import LatencyTable, Timing, default_path
from sbf_dist.compression.progress import Progress
from sbf_dist.export.onnx import to_onnx, verify_onnx
from sbf_dist.export.optimize import optimize
from sbf_dist.export.saved import ONNX, Card, save_student
from sbf_dist.recipe import Recipe

LARGEST_ONNX_DIFFERENCE = 1e-4
VERIFIED_IMAGES = 64  # on which the exported network is compared


def make(
    recipe: Recipe,
    dense: nn.Module,
    model_name: str,
    images: Calibration,
    display: Display,
) -> tuple[nn.Module, Plan]:
    """Plan and fit the student of `dense` within the recipe's budget, and say what it saves."""
    settings = recipe.compress
    table = LatencyTable(settings.latency_table or default_path(), settings.latency_batch)
    student, plan = compress(
        dense,
        images,
        settings,
        name=model_name,
        seed=recipe.seed,
        progress=progress_of(display),
        timing=Timing(table, optimize),
    )
    display.say(f"  {plan.summary()}")
    return student, plan


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
    to_onnx(student, onnx, card)
    difference = verify_onnx(onnx, student, images)
    if difference > LARGEST_ONNX_DIFFERENCE:
        raise RuntimeError(
            f"{onnx}: differs from the student by {difference:.2e} in the logits of "
            f"{len(images)} images, more than {LARGEST_ONNX_DIFFERENCE:.0e}"
        )
    return difference
