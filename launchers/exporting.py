"""The work of `sbf export`: a student in a form that others read, checked against PyTorch."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from launchers.display import Display
from launchers.evaluating import evaluate
from launchers.export_forms import FORMS, Outputs, Student, Written
from launchers.exported import Exported
from launchers.images import evaluation_images
from launchers.labelled_images import Images, View
from sbf_dist.compression.plan import Plan
from sbf_dist.compression.planning.latency import MachineBusyError, timed
from sbf_dist.errors import UserError
from sbf_dist.export import int8
from sbf_dist.export.model_card import History, write_model_card
from sbf_dist.export.saved import load_card, load_student
from sbf_dist.export.student_files import PLAN
from sbf_dist.files import flush_below

COMPARED = 64  # images on which a file is compared with PyTorch
# By which outputs may differ, or the largest where that is above 1.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}


@dataclass(frozen=True)
class Row:
    """One file of the table.

    divergence  from the student in PyTorch: KL in nats of a classifier, otherwise the squared error
                in units of the outputs' variance
    top1        in [0, 1] on the validation images; None if it cannot be measured
    latency_ms  of one image; None where the file is no program, or the machine was too busy
    """

    file: str
    precision: str
    megabytes: float
    divergence: float
    top1: float | None
    latency_ms: float | None


def open_student(
    exported: Exported, images: Images | None, history: History | None, build: str | None
) -> Student:
    """Load a student from its folder. UserError if it is an ONNX file, or takes several inputs.

    images: what it is judged on, and calibrated with; build: see `load_student`.
    """
    if exported.folder is None:
        raise UserError(f"model {exported.given} is a file: give a student's or a run's folder")
    module = load_student(exported.folder, build)
    card = load_card(exported.folder)
    if card.other_inputs:
        raise UserError(
            f"student {exported.given} takes {1 + len(card.other_inputs)} inputs, sbf export "
            "supports one; sbf_dist.export.onnx.export_onnx writes such networks"
        )
    if images is not None and card.mean is not None and card.std is not None:
        images = images.seen_as(View(card.input_shape, card.mean, card.std, card.crop))
        ids = images.validation[:COMPARED]
        compared = evaluation_images(images.data, images.index, ids)
    else:
        images = None
        generator = torch.Generator().manual_seed(0)
        compared = torch.randn(COMPARED, *card.input_shape, generator=generator)
    return Student(
        module=module,
        plan=Plan.load(exported.folder / PLAN),
        card=card,
        history=history,
        images=images,
        compared=np.ascontiguousarray(compared.numpy()),
        build=build,
    )


def export(student: Student, form: str, precision: str, out: Path, display: Display) -> list[Row]:
    """Write a student to the new folder `out`, in one step; return rows of it and of it in fp32.

    form: of FORMS; precision: "fp32", "fp16" or, of ONNX files, alone or in MLflow's folder,
    "int8". Raises UserError where the network does not bear the precision, RuntimeError where a
    file disagrees with PyTorch all the same.
    """
    if precision == "int8" and student.images is None:
        raise UserError(
            "--precision int8 needs images that ranges are measured on, and a student that knows "
            "its mean and std: give a run's folder, or --data RECIPE|FOLDER"
        )
    write = FORMS[form]
    with _new_folder(out) as folder, tempfile.TemporaryDirectory() as aside:
        written = {precision: write(student, precision, folder, display)}
        if precision != "fp32":
            written = {"fp32": write(student, "fp32", Path(aside), display)} | written
        for name, one in written.items():
            _check(student, name, one)
        rows = _rows(student, written, display)
        write_model_card(folder, student.card, student.plan, student.history)
    return rows


def table_of(rows: Sequence[Row], *, logits: bool) -> Table:
    """Return the table of an export; logits: of a classifier."""
    table = Table(box=None, pad_edge=False)
    table.add_column("file", no_wrap=True)
    headings = ("precision", "MB", "top-1 %", "KL" if logits else "error", "latency (ms)")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.file,
            row.precision,
            f"{row.megabytes:.2f}",
            "-" if row.top1 is None else f"{100 * row.top1:.1f}",
            f"{row.divergence:.2g}",
            "-" if row.latency_ms is None else f"{row.latency_ms:.2f}",
        )
    return table


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the table as a program reads it."""
    return [asdict(row) for row in rows]


def _check(student: Student, precision: str, written: Written) -> None:
    found, wanted = written.run(student.compared), student.run(student.compared)
    if not all(np.isfinite(one).all() for one in wanted):
        raise UserError(f"student: its outputs for {len(student.compared)} images are not finite")
    if precision == "int8":
        off = int8.divergence(found, wanted, logits=student.is_classifier)
        if not off <= int8.LIMIT:
            raise RuntimeError(f"{written.path.name}: diverges from the student by {off:.2e}")
        return
    difference, largest = _difference(found, wanted)
    if difference <= TOLERANCE[precision] * max(1.0, largest):
        return
    differs = (
        f"{written.path.name} differs from the student by {difference:.2e} in the outputs for "
        f"{len(student.compared)} images, of which the largest is {largest:.2e}"
    )
    if precision == "fp16":
        raise UserError(f"--precision fp16: {differs}; this network needs fp32")
    raise RuntimeError(differs)


def _difference(found: Outputs, wanted: Outputs) -> tuple[float, float]:
    """Return the largest difference, infinite where there is no number, and the largest output."""
    pairs = list(zip(found, wanted, strict=True))
    differences = [float(np.abs(one - other).max()) for one, other in pairs if other.size]
    largest = [float(np.abs(other).max()) for _, other in pairs if other.size]
    worst = max(differences, default=0.0)
    finite = all(np.isfinite(one).all() for one, _ in pairs)
    return (worst if finite else np.inf), max(largest, default=0.0)


def _rows(student: Student, written: Mapping[str, Written], display: Display) -> list[Row]:
    wanted = student.run(student.compared)
    top1 = [_top1(student, one, display) for one in written.values()]
    return [
        Row(
            file=one.path.name,
            precision=precision,
            megabytes=round(one.path.stat().st_size / 1e6, 4),
            divergence=int8.divergence(
                one.run(student.compared), wanted, logits=student.is_classifier
            ),
            top1=accuracy,
            latency_ms=ms,
        )
        for (precision, one), accuracy, ms in zip(
            written.items(), top1, _latencies(list(written.values())), strict=True
        )
    ]


def _top1(student: Student, written: Written, display: Display) -> float | None:
    images = student.images
    if images is None or not images.index.classes or not student.is_classifier:
        return None
    try:
        scores = evaluate(
            lambda batch: written.run(batch)[0], student.card.classes, images, display
        )
    except UserError as error:
        display.say(f"  accuracy not measured: {error}")
        return None
    return scores.all.top1


def _latencies(written: Sequence[Written]) -> list[float | None]:
    timers = [one.timer for one in written if one.timer is not None]
    if len(timers) < len(written):
        return [None] * len(written)
    try:
        # Not by turns: a session's threads spin for a while after a run, and would keep those of
        # the next from a processor.
        return [round(timed([timer], strict=True)[0], 4) for timer in timers]
    except MachineBusyError:
        return [None] * len(written)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Give a folder that becomes `out` when the body ends; it must be new, or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is not empty; name a new folder")
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as beside:
        folder = Path(beside) / out.name
        folder.mkdir()
        yield folder
        flush_below(folder)
        folder.replace(out)
