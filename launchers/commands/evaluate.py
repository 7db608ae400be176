"""`sbf evaluate`: the accuracy of a student on labelled images."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launchers.exported import find_exported, open_onnx
from sbf_dist.errors import UserError

if TYPE_CHECKING:
    from launchers.evaluating import Scores


def command(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="An ONNX file, a student's folder or a run's folder."),
    ],
    images: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE|FOLDER",
            help="A recipe (its validation images are used), or a folder with CLASS/* (the "
            "images in val/, or all if there is no val/).",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Overrides of recipe keys, e.g. data.root=photos."
        ),
    ] = None,
    runs: Annotated[
        Path, typer.Option(help="Folder that holds all runs, and embedded sets.")
    ] = Path("runs"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the accuracy of each class.")
    ] = False,
) -> None:
    """Measure the accuracy of a student on labelled images with ONNX Runtime.

    Classes are matched by name. Images are prepared as in the evaluation of a run.
    """
    exported = find_exported(model)
    if not images.exists():
        raise UserError(f"{images} does not exist; give a recipe or a folder of images")
    # These take seconds to import: not before the command line is known to be right.
    from rich.console import Console

    from launchers.display import Display
    from launchers.evaluating import evaluate
    from launchers.labelled_images import View, images_at
    from launchers.machine import available_cpus

    student = open_onnx(exported, available_cpus())
    view = View(student.input_shape, student.mean.tolist(), student.std.tolist(), student.crop)
    with Display(Console(highlight=False, stderr=as_json)) as display:
        found = images_at(images, overrides or [], runs, display).seen_as(view)
        if student.crop is None:
            source = "" if images.is_dir() else f", as {images} says"
            display.say(
                f"  {model} does not say which crop it was evaluated with: using "
                f"{found.data.crop}{source}"
            )
        scores = evaluate(student.logits, student.classes.tolist(), found, display)
    if as_json:
        print(json.dumps({"model": str(model), **scores.as_json()}, ensure_ascii=False))
    else:
        _print(scores)


def _print(scores: "Scores") -> None:
    top5 = "" if scores.all.top5 is None else f", top-5 {100 * scores.all.top5:.1f} %"
    print(f"top-1 {100 * scores.all.top1:.1f} %{top5}, {scores.all.images} images")
    worst = sorted(scores.classes.items(), key=lambda item: item[1].top1)[:3]
    lowest = ", ".join(f"{name} {100 * score.top1:.1f} %" for name, score in worst)
    print(f"lowest of {len(scores.classes)} classes: {lowest} (all with --json)")
