"""A student as a folder of safetensors and JSON: read without pickle, and checked when read."""

import inspect
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from sbf_dist import models
from sbf_dist.compression.convert import convert
from sbf_dist.compression.plan import MeasuredFidelity, OtherInput, Plan
from sbf_dist.compression.remembered import plan_of, remember
from sbf_dist.errors import UserError
from sbf_dist.export.student_files import CARD, MODEL_CARD, ONNX, PLAN, WEIGHTS
from sbf_dist.export.tracing import example_inputs
from sbf_dist.files import flush_below, sha256
from sbf_dist.schema import equals
from sbf_dist.surgery import unwrapped
from sbf_dist.weights import load_state, read_safetensors, save_weights

logger = logging.getLogger(__name__)


class Card(BaseModel):
    """What a user of the student must know besides its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    model: str  # as sbf_dist.models.build takes it, or 'package.module:Class'
    arguments: dict[str, Any] = {}  # further ones that the dense network was built with
    classes: list[str]  # names, in the order of the logits; none if it gives no logits
    input_shape: tuple[int, int, int]  # channels, height, width
    other_inputs: list[OtherInput] = []  # what it takes beside the images
    mean: list[float] | None = None  # per channel, of values in [0, 1]; None if not known
    std: list[float] | None = None
    # side of the centre crop in evaluation, share of an image's short side; None if not known
    crop: float | None = Field(None, exclude_if=equals(None))
    top1: float | None = None  # validation accuracy in [0, 1], None if not measured
    fidelity: MeasuredFidelity | None = None  # how near it is to the dense network, if measured
    plan_digest: str
    weights_digest: str | None = None  # SHA-256 of the weights file; save_student fills it in

    @classmethod
    def of(
        cls,
        plan: Plan,
        *,
        classes: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop: float | None = None,
        top1: float | None = None,
        fidelity: MeasuredFidelity | None = None,
    ) -> "Card":
        """Describe a student of `plan`.

        classes: names in the order of the logits; None numbers them from 0. mean, std: by which
        images are normalised, of each channel; crop: share of an image's short side that the
        evaluation shows; None if that is not to be recorded. Raises UserError for another number of
        names than the plan has classes, or of channels.
        """
        names = [str(i) for i in range(plan.classes)] if classes is None else list(classes)
        if len(names) != plan.classes:
            raise UserError(f"{len(names)} class names for a plan of {plan.classes} classes")
        channels = plan.input_shape[0]
        for key, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != channels:
                raise UserError(f"{key} has {len(values)} values for {channels} channels")
        return cls(
            model=plan.model,
            arguments=plan.arguments,
            classes=names,
            input_shape=plan.input_shape,
            other_inputs=plan.other_inputs,
            mean=None if mean is None else list(mean),
            std=None if std is None else list(std),
            crop=crop,
            top1=top1,
            fidelity=fidelity,
            plan_digest=plan.digest(),
        )


def save_student(folder: Path, model: nn.Module, plan: Plan, card: Card) -> None:
    """Write weights.safetensors, plan.json and card.json into `folder`, in one step.

    `model` is what `convert` returned for `plan`, trained, not folded. An older student in `folder`
    is replaced, with its student.onnx and README.md; UserError if the folder holds other things.
    Raises ValueError if model, plan and card do not belong together.
    """
    model = unwrapped(model)
    if card.plan_digest != plan.digest():
        raise ValueError("the card belongs to another plan")
    difference = _difference(model, plan)
    if difference is not None:
        raise ValueError(difference)
    _write(folder, model, plan, card)


def save(
    student: nn.Module,
    folder: Path | str,
    *,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop: float | None = None,
    top1: float | None = None,
    fidelity: MeasuredFidelity | None = None,
) -> None:
    """Save a student to `folder`; `sbf_dist.load` loads it.

    student: returned by `compress`, `shrink`, `convert` or `load`, trained or not. classes, mean,
    std, crop: class names and preprocessing, stored for users of the student; see `Card.of`. top1:
    measured accuracy in [0, 1]. fidelity: how close it is to the dense network, for instance
    `plan.fidelity` of a student that was not trained since.

    An older student in `folder` is replaced. Raises UserError if the folder holds other things, or
    the student does not match its plan.
    """
    student = unwrapped(student)
    plan = plan_of(student)
    card = Card.of(
        plan, classes=classes, mean=mean, std=std, crop=crop, top1=top1, fidelity=fidelity
    )
    difference = _difference(student, plan)
    if difference is not None:
        raise UserError(
            f"the student does not match its plan ({difference}): save it before it is folded, "
            "optimized or changed"
        )
    _write(Path(folder), student, plan, card)


def _write(folder: Path, model: nn.Module, plan: Plan, card: Card) -> None:
    check_folder(folder)
    folder = folder.resolve()  # a link stays, and "." has a name
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        save_weights(model, partial / WEIGHTS)
    except UserError:  # extra state that cannot be written
        shutil.rmtree(partial)
        raise
    plan.save(partial / PLAN)
    card = card.model_copy(update={"weights_digest": sha256(partial / WEIGHTS)})
    (partial / CARD).write_text(card.model_dump_json(indent=2) + "\n")
    _replace_folder(partial, folder)


def _difference(student: nn.Module, plan: Plan) -> str | None:
    """Say in what `student` is not what `plan` makes of the dense network, if that can be built."""
    if not models.is_buildable(plan.model):
        return None
    dense = models.build(plan.model, plan.classes, plan.arguments)
    expected = convert(dense, plan).state_dict()
    state = student.state_dict()
    for name in [*expected, *(key for key in state if key not in expected)]:
        shapes = [_shape(d[name]) if name in d else None for d in (state, expected)]
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0]} in the model, {shapes[1]} in the plan"
    return None


def _shape(value: Any) -> tuple[int, ...]:
    """Shape of an entry of a state dict, () if it is no tensor (get_extra_state)."""
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def check_folder(folder: Path) -> None:
    """Raise UserError if `folder` is a file, or holds anything that is no part of a student."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"folder {folder} is a file")
    ours = {WEIGHTS, PLAN, CARD, ONNX, MODEL_CARD}
    strangers = sorted(entry.name for entry in folder.iterdir() if entry.name not in ours)
    if strangers:
        raise UserError(
            f"folder {folder} holds {strangers[0]!r}, which is not part of a student: "
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


def load_student(
    folder: Path | str, build: Callable[..., nn.Module] | str | None = None
) -> nn.Module:
    """Build the student that was saved in `folder`, on the CPU, in eval mode.

    build: builds the dense network, with any weights: a function or class, or its name,
    'path/to/file.py:function' or 'package.module:function'. It is called with the arguments stored
    in the plan. Not needed for networks of timm, torchvision and this project. A network that
    lacks buffers of the file is run once: some register them in their first forward pass.

    Nothing is unpickled, and no code is run because the folder names it. Raises UserError that
    names a missing, damaged or inconsistent file, or says that `build` is needed.
    """
    folder = Path(folder)
    card = load_card(folder)
    plan = Plan.load(folder / PLAN)
    if plan.digest() != card.plan_digest:
        raise UserError(f"file {folder / PLAN} does not belong to the {CARD} beside it")
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"file {path} does not exist: {folder} is not a complete student")
    if sha256(path) != card.weights_digest:
        raise UserError(f"file {path} is damaged: its SHA-256 is not the one in {CARD}")
    model = convert(_dense(folder, plan, build), plan)
    model.eval()  # a statement: a network's own train() may return nothing
    try:
        state = read_safetensors(path)
        if state.keys() - model.state_dict().keys():
            _run_once(model, plan)
        load_state(model, state)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"file {path} does not fit {PLAN}: {_first_line(error)}") from error
    return remember(model, plan)


@torch.no_grad()
def _run_once(model: nn.Module, plan: Plan) -> None:
    """Let a network make what some make in their first forward pass: buffers of positions."""
    try:
        model(*example_inputs(1, plan))
    except Exception as error:  # whatever the network's own code raises
        # What is missing then is said when the weights are loaded.
        logger.debug("%s cannot be run: %s", type(model).__name__, error)


def _replace_folder(new: Path, folder: Path) -> None:
    """Move `new` to `folder`; at no moment is there a folder with files of two students."""
    flush_below(new)
    if not folder.exists():
        new.rename(folder)
        return
    if folder == Path.cwd():
        _replace_files(new, folder)
        return
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old)


def _replace_files(new: Path, folder: Path) -> None:
    """Move the files of `new` to `folder`, which others may be in: this process, and its shell.

    Without the card, which goes first and comes last, the folder is no student.
    """
    for name in (CARD, *(entry.name for entry in folder.iterdir())):
        (folder / name).unlink(missing_ok=True)
    for name in (WEIGHTS, PLAN, CARD):
        (new / name).rename(folder / name)
    new.rmdir()


def _dense(folder: Path, plan: Plan, build: Callable[..., nn.Module] | str | None) -> nn.Module:
    """Build the dense network of a plan."""
    if isinstance(build, str):
        return models.build(build, None, plan.arguments)
    if build is None:
        if not models.is_buildable(plan.model):
            raise UserError(
                f"folder {folder} holds a student of {plan.model!r}, which sbf_dist cannot build: "
                "give the function that makes the dense network, as load(folder, build=MyNet), or "
                f"its name, build={plan.model!r}, if you trust that code; what a folder names is "
                "not run"
            )
        return models.build(plan.model, plan.classes, plan.arguments)
    try:
        inspect.signature(build).bind(**plan.arguments)
    except TypeError as error:
        raise UserError(
            f"build does not take the arguments {plan.arguments} of the plan in {folder}: {error}"
        ) from None
    except ValueError:
        pass  # it has no signature: the call will tell
    dense = build(**plan.arguments)
    if not isinstance(dense, nn.Module):
        raise UserError(
            f"build returns a {type(dense).__name__}: it must return the dense network, a module"
        )
    return dense


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else first["msg"]
    return " ".join(str(error).split())[:300]
