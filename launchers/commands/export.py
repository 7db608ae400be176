"""`sbf export`: a finished student as ONNX, PyTorch's program, safetensors or an MLflow model."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launchers.exported import find_exported
from launchers.places import check_writable
from sbf_dist.errors import UserError


class Form(StrEnum):
    """In which form a student is written."""

    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"
    SAFETENSORS = "safetensors"
    MLFLOW = "mlflow"


class Precision(StrEnum):
    """In which numbers it is written."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


def command(
    model: Annotated[
        Path, typer.Argument(metavar="RUN|FOLDER", help="A run's or a student's folder.")
    ],
    out: Annotated[Path, typer.Option(help="Output folder; must be new or empty.")],
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            help="onnx: for ONNX Runtime and others; torch-export: a program that PyTorch alone "
            "loads; safetensors: a student's folder; mlflow: for mlflow models serve.",
        ),
    ] = Form.ONNX,
    precision: Annotated[
        Precision, typer.Option(help="int8: for onnx and mlflow, calibrated on the run's images.")
    ] = Precision.FP32,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="RECIPE|FOLDER",
            help="Images for calibration and comparison. Default: those of the run.",
        ),
    ] = None,
    build: Annotated[
        str | None,
        typer.Option(
            help="Function that builds your own network: path/to/file.py:function or "
            "package.module:function."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Export a student with a model card, and compare it with PyTorch.

    The batch size is free; classes, normalisation and input size are stored in the file. With
    int8, layers that would change the predictions too much stay in float, and are listed.
    """
    if precision is Precision.INT8 and form not in (Form.ONNX, Form.MLFLOW):
        raise UserError(f"--precision int8: is for --format onnx and mlflow, not for {form}")
    exported = find_exported(model)
    if data is not None and not data.exists():
        raise UserError(f"--data {data}: does not exist; give a recipe or a folder of images")
    check_writable("--out", out)
    # These take seconds to import: not before the command line is known to be right.
    import torch
    from rich.console import Console

    from launchers import exporting
    from launchers.display import Display
    from launchers.labelled_images import history_of_run, images_of_run, images_to_calibrate
    from launchers.machine import available_cpus

    torch.set_num_threads(available_cpus())
    with Display(Console(highlight=False, stderr=as_json)) as display:
        images = None
        if data is not None:
            images = images_to_calibrate(data, out.absolute().parent, display)
        elif exported.run is not None:
            images = images_of_run(exported)
        history = None if exported.run is None else history_of_run(exported)
        student = exporting.open_student(exported, images, history, build)
        if images is None:
            display.say("  no images given (--data): compared on random noise")
        rows = exporting.export(student, form.value, precision.value, out, display)
        if not as_json:
            display.console.print(exporting.table_of(rows, logits=student.is_classifier))
            display.say(f"written to {out}/, with a model card in README.md")
    if as_json:
        print(json.dumps(exporting.as_json(rows)))
