"""`sbf predict`: what a student says of pictures, by ONNX Runtime alone."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launchers.exported import find_exported, open_onnx
from sbf_dist.errors import UserError

if TYPE_CHECKING:
    from launchers.predicting import Prediction

DEFAULT_TOP = 5
UNREADABLE = 1  # exit code
_ANY_WIDTH = 10_000  # characters


def command(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="An ONNX file, a student's folder or a run's folder."),
    ],
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES",
            help="Files, folders, patterns in quotes ('photos/**/*.jpg'); -: read a list from "
            "standard input, one per line.",
        ),
    ],
    top: Annotated[
        int | None,
        typer.Option(min=1, help=f"Number of classes per image. Default: {DEFAULT_TOP}."),
    ] = None,
    crop: Annotated[
        float | None,
        typer.Option(
            help="Side of the centre crop, share of the image's short side, in (0, 1]. Default: "
            "that of the evaluation."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON per image.")
    ] = False,
) -> None:
    """Print the most probable classes of images.

    Images are prepared as in the evaluation. Unreadable images are reported on standard error and
    skipped; the exit code is then 1.
    """
    if crop is not None and not 0 < crop <= 1:
        raise UserError(f"--crop {crop:g}: must be in (0, 1]")
    exported = find_exported(model)
    # These take a second to import: not before the command line is known to be right.
    from launchers.machine import available_cpus
    from launchers.predicting import find_pictures, predictions
    from sbf_dist.export.sbf_student import DEFAULT_CROP

    pictures = find_pictures(images, sys.stdin)
    student = open_onnx(exported, available_cpus())
    if top is not None and top > len(student.classes):
        raise UserError(f"--top {top}: {model} has {len(student.classes)} classes")
    if crop is not None:
        student.crop = crop
    elif student.crop is None:
        print(
            f"sbf: {model} does not say which crop it was evaluated with: using {DEFAULT_CROP}; "
            "set --crop to change it",
            file=sys.stderr,
        )
    found = predictions(student, pictures, min(top or DEFAULT_TOP, len(student.classes)))
    unreadable = _print_lines(found) if as_json else _print_table(found)
    if unreadable:
        print(f"sbf: {unreadable} of {len(pictures)} images are not readable", file=sys.stderr)
        raise typer.Exit(UNREADABLE)


def _print_lines(found: Iterable["Prediction"]) -> int:
    """Print JSON lines; return how many images are not readable."""
    unreadable = 0
    for one in found:
        line: dict[str, object] = {"image": one.image}
        if one.error is None:
            line["top"] = [{"class": name, "probability": round(p, 6)} for name, p in one.top]
        else:
            line["error"] = one.error
            unreadable += 1
            _name(one)
        print(json.dumps(line, ensure_ascii=False))
    return unreadable


def _print_table(found: Iterable["Prediction"]) -> int:
    """Print a table; return how many images are not readable."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("image", overflow="fold")
    unreadable = columns = 0
    for one in found:
        if one.error is not None:
            unreadable += 1
            _name(one)
            continue
        for place in range(columns, len(one.top)):
            table.add_column(f"top {place + 1}")
        columns = max(columns, len(one.top))
        table.add_row(one.image, *(f"{name} {100 * p:.1f} %" for name, p in one.top))
    if table.row_count:
        console = Console(highlight=False, markup=False)
        if not console.is_terminal:  # a file or a pipe has no width to break lines for
            console.width = _ANY_WIDTH
        console.print(table)
    return unreadable


def _name(one: "Prediction") -> None:
    print(f"sbf: {one.image}: {one.error}", file=sys.stderr)
