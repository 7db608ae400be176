"""`sbf plan`: plans as tables."""

from typing import Annotated

import typer
from rich.console import Console

from launchers.storage.looking import looked_at
from sbf_dist.errors import UserError

app = typer.Typer(
    help="Show compression plans.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_FILE = "plan.json"


@app.callback()
def _group() -> None:
    """Keep `show` a command of its own: a single one would take the group's place."""


@app.command(short_help="Print a plan as a table, a row for each convolution.")
def show(
    place: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="A student's or a run's folder, or a plan's file; or its address."
        ),
    ],
) -> None:
    """Print kept, rebuilt and removed channels of each convolution, its cost, and the reason."""
    with looked_at(place, lambda key: key == _FILE) as looked:
        path = looked.path / _FILE if looked.path.is_dir() else looked.path
        if looked.path.is_dir() and not path.exists():
            raise UserError(f"folder {place} has no {_FILE}: give a student's or a run's folder")
        from sbf_dist.compression.plan import Plan
        from sbf_dist.report.plan_table import show_plan

        show_plan(Plan.load(path), Console(highlight=False))
