"""`sbf label`: the teachers' predictions on all images, and a report on them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from launchers.commands import run
from launchers.commands.run import StageName
from launchers.storage.looking import looked_at
from sbf_dist.errors import UserError

_STAGE = StageName("pseudo-labels")
_RECIPE = "RECIPE"
# Of a run in an object store: what is large, and not needed.
_NOT_READ = ("checkpoints/", "weights/", "student/", "tracking/", "logs/")


class _WithRecipe(TyperGroup):
    """A group whose first argument is a recipe unless it is the name of a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "--help"):
            args = [_RECIPE, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_WithRecipe,
    help="Write the teachers' predictions for all images: sbf label RECIPE [KEY=VALUE …]. "
    "Unfinished earlier stages run first.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command(_RECIPE, short_help="Write the pseudo-labels of a recipe (sbf label RECIPE).")
def write(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Overrides of recipe keys, e.g. pseudo_labels.threshold=0.7 workers.count=4.",
        ),
    ] = None,
    runs: Annotated[
        str, typer.Option(help="Folder that holds all runs, or an object store, as for sbf run.")
    ] = "runs",
    again: Annotated[
        StageName | None, typer.Option(help="Repeat this stage and those after it.")
    ] = None,
) -> None:
    """Prepare the images, train the teachers if needed, and write their predictions.

    The same as sbf run RECIPE --until pseudo-labels; sbf run RECIPE continues from there.
    """
    run.command(recipe_file, overrides, runs, until=_STAGE, again=again)


@app.command(short_help="Report on the quality of pseudo-labels: table, picture, JSON.")
def report(
    place: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="The folder of a run or of pseudo-labels: a path or an address."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Output picture. Default: labels.png.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, and draw no picture.")
    ] = False,
) -> None:
    """Print count, confidence, agreement, accuracy and calibration error; draw a picture.

    Accuracy is measured on images whose class is known. The teachers were trained on the labelled
    ones: use the figures of the validation images.
    """
    picture = out or Path("labels.png")
    if as_json and out is not None:
        raise UserError(f"--out {out}: is for the picture, which --json does not draw")
    if picture.is_dir() or not picture.absolute().parent.is_dir():
        raise UserError(f"--out {picture}: must be a file in a folder that exists")
    with looked_at(place, lambda key: not key.startswith(_NOT_READ)) as looked:
        from launchers.run import label_report

        found = label_report.of_place(looked.path)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from launchers.display import Display, labels_table

    display = Display()
    display.console.print(labels_table(found))
    label_report.draw(found, picture)
    display.say(f"picture {picture}")
