"""`sbf compare`: SBF beside pruning, DepGraph, Ghost and low rank, at equal cost and training."""

from pathlib import Path
from typing import Annotated

import typer

from launchers.places import check_writable
from sbf_dist import compare_recipe


def command(
    recipe_file: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="The recipe, e.g. recipes/compare-digits.yaml.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Overrides of recipe keys, e.g. macs=[0.5] seeds=[0,1] recovery.steps=[100].",
        ),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder that holds all runs and comparisons.")] = Path(
        "runs"
    ),
) -> None:
    """Compare SBF with other methods at equal multiply-adds and training, over several seeds.

    Prints a table of means and deviations. Writes it to RUNS/NAME as comparison.json and as a
    chart, comparison.png. Finished trainings are kept there and not repeated: an interrupted
    comparison resumes.
    """
    recipe = compare_recipe.load(recipe_file, overrides or ())
    check_writable("--runs", runs)
    # These take seconds to import: not before the command line is known to be right.
    import torch

    from launchers.comparison.statistics import comparison_table
    from launchers.comparison.summary import compare
    from launchers.display import Display
    from launchers.machine import available_cpus

    torch.set_num_threads(available_cpus())
    runs = runs.absolute()
    with Display() as display:
        report = compare(recipe, runs, display)
    display.console.print(comparison_table(report["rows"]))
    for row in report["rows"]:
        if row.get("refused"):
            display.say(f"{row['title']}, {100 * row['macs']:.0f} %: {row['refused']}")
    display.say(f"\ncomparison  {runs / recipe.name}/ (comparison.json, comparison.png)")
