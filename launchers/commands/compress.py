"""`sbf compress`: a network, a folder of images and a budget; one shot, no training."""

from pathlib import Path
from typing import Annotated, Any

import typer

from launchers.places import check_writable
from sbf_dist import compress_recipe
from sbf_dist.budget import BUDGETS
from sbf_dist.compress_recipe import OneShot
from sbf_dist.errors import UserError

HELD_OUT_SHARE = 0.1  # of the images, where the folder has no val/: accuracy is measured on them


def command(
    model: Annotated[
        str,
        typer.Option(
            help="The network: timm:NAME, torchvision:NAME, cifar_resnet20, or your own as "
            "path/to/file.py:function or package.module:function (arguments.KEY=VALUE for it)."
        ),
    ],
    weights: Annotated[
        Path, typer.Option(help="Weights: a safetensors file, or a state dict of torch.save.")
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Folder of images: CLASS/*, train/CLASS/* and val/CLASS/*, or without classes; or "
            "the address of a prepared set in shards, s3://BUCKET/FOLDER."
        ),
    ],
    budget: Annotated[
        str,
        typer.Option(
            metavar="KEY=VALUE",
            help="Cost budget: macs=0.5, params=0.5, latency=0.6, latency_ms=12.5.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output folder.")],
    classes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of classes, if it differs from the number of class folders; 0: timm's "
            "networks without classifier.",
        ),
    ] = None,
    weights_key: Annotated[
        str | None,
        typer.Option(help="Key of the state dict in the weights file, if several fit."),
    ] = None,
    weights_prefix: Annotated[
        str | None,
        typer.Option(help="Prefix of the names in the weights file, if several fit."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings as in a recipe, e.g. data.image_size=160 compress.sources=8 "
            "compress.outputs=[out] seed=1.",
        ),
    ] = None,
) -> None:
    """Compress a network within a budget, without training, and export the student.

    Writes weights (safetensors), plan, model card and ONNX to OUT. If the images have labels, the
    accuracy before and after is measured on val/, or on a held-out tenth of the images.
    """
    settings = settings_of(model, weights, data, budget, overrides or [])
    check_writable("--out", out)
    # It takes seconds to import: not before the command line is known to be right.
    from launchers.one_shot import compress_once

    compress_once(settings, out, classes, weights_key=weights_key, weights_prefix=weights_prefix)


def settings_of(model: str, weights: Path, data: str, budget: str, overrides: list[str]) -> OneShot:
    """Check the command line as a recipe is checked."""
    key, equals, _ = budget.partition("=")
    if key not in BUDGETS or not equals:
        raise UserError(
            f"budget {budget!r} must look like macs=0.5; known are {', '.join(BUDGETS)}"
        )
    content: dict[str, Any] = {
        "model": model,
        "weights": str(weights),
        "data": {"root": data, "validation": HELD_OUT_SHARE},
        "compress": {},
    }
    return compress_recipe.validate(content, [f"compress.{budget}", *overrides], "command line")
