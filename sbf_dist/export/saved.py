"""A student as a folder of safetensors and JSON: read without pickle, and checked when read."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sbf_dist import models
from sbf_dist.compression.convert import convert
from sbf_dist.compression.plan import Plan
from sbf_dist.errors import UserError
from sbf_dist.weights import load_state

WEIGHTS = "weights.safetensors"
PLAN = "plan.json"
CARD = "card.json"
ONNX = "student.onnx"


class Card(BaseModel):
    """What a user of the student must know besides its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    model: str  # as sbf_dist.models.build takes it
    classes: list[str]  # names, in the order of the logits
    input_shape: tuple[int, int, int]  # channels, height, width
    mean: list[float]  # per channel, of values in [0, 1]
    std: list[float]
    top1: float | None = None  # validation accuracy in [0, 1], None if not measured
    plan_digest: str
    weights_digest: str | None = None  # SHA-256 of the weights file; save_student fills it in

    @classmethod
    def of(
        cls,
        plan: Plan,
        *,
        classes: list[str],
        mean: list[float],
        std: list[float],
        top1: float | None = None,
    ) -> "Card":
        """Make the card of a student of `plan`; ValueError if there are too many or few classes."""
        if len(classes) != plan.classes:
            raise ValueError(f"{len(classes)} class names for a plan of {plan.classes} classes")
        return cls(
            model=plan.model,
            classes=classes,
            input_shape=plan.input_shape,
            mean=mean,
            std=std,
            top1=top1,
            plan_digest=plan.digest(),
        )


def save_student(folder: Path, model: nn.Module, plan: Plan, card: Card) -> None:
    """Write weights.safetensors, plan.json and card.json into `folder`, in one step.

    `model` is what `convert` made of `plan`, trained, not folded. An older student in `folder` is
    replaced (with its student.onnx, which belongs to it); UserError if the folder holds other
    things. Raises ValueError if model, plan and card do not belong together.
    """
    if card.plan_digest != plan.digest():
        raise ValueError("the card was made for another plan")
    state = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    expected = convert(models.build(plan.model, plan.classes), plan).state_dict()
    for name in expected.keys() | state.keys():
        shapes = [tuple(d[name].shape) if name in d else None for d in (state, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]} in the model, {shapes[1]} by the plan")
    check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(state, partial / WEIGHTS)
    plan.save(partial / PLAN)
    card = card.model_copy(update={"weights_digest": _sha256(partial / WEIGHTS)})
    (partial / CARD).write_text(card.model_dump_json(indent=2) + "\n")
    _replace_folder(partial, folder)


def check_folder(folder: Path) -> None:
    """Raise UserError if `folder` is a file, or holds anything that is no part of a student."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"folder {folder} is a file")
    ours = {WEIGHTS, PLAN, CARD, ONNX}
    strangers = sorted(entry.name for entry in folder.iterdir() if entry.name not in ours)
    if strangers:
        raise UserError(
            f"folder {folder} holds {strangers[0]!r}, which is no part of a student: "
            "choose an empty or a new folder"
        )


def load_card(folder: Path) -> Card:
    """Read the card of a saved student; UserError naming the file if missing or damaged."""
    path = folder / CARD
    try:
        return Card.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise UserError(f"file {path} does not exist: {folder} is not a saved student") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"file {path} is damaged: {_first_line(error)}") from None


def load_student(folder: Path) -> nn.Module:
    """Build the student that `save_student` wrote, on the CPU, in eval mode.

    Nothing is unpickled. Raises UserError naming the file that is missing, damaged, or does not
    belong to the others.
    """
    card = load_card(folder)
    plan = Plan.load(folder / PLAN)
    if plan.digest() != card.plan_digest:
        raise UserError(f"file {folder / PLAN} is not the plan that {CARD} beside it was made for")
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"file {path} does not exist: {folder} is not a complete student")
    if _sha256(path) != card.weights_digest:
        raise UserError(f"file {path} is damaged: its SHA-256 is not the one in {CARD}")
    model = convert(models.build(plan.model, plan.classes), plan)
    try:
        load_state(model, load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"file {path} does not fit {PLAN}: {_first_line(error)}") from error
    return model.eval()


def _replace_folder(new: Path, folder: Path) -> None:
    """Move `new` to `folder`; at no moment is there a folder with files of two students."""
    if not folder.exists():
        new.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else first["msg"]
    return " ".join(str(error).split())[:300]
