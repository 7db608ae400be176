"""The `sbf` command."""

import fcntl
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from launchers import compare, compress, data, plan
from launchers.display import Display, results_table
from launchers.layout import RunFolder
from sbf_dist import recipe as recipes
from sbf_dist.errors import UserError
from sbf_dist.recipe import Recipe

app = typer.Typer(
    help="SBF-Dist: CNNs at half the cost, compressed by spatial basis filters and distilled "
    "from a teacher ensemble. To begin: sbf run recipes/digits.yaml",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(plan.app, name="plan", short_help="Plans as tables.")
app.add_typer(data.app, name="data", short_help="Sets of images from their archives.")


class StageName(StrEnum):
    """The stages of a run, in order."""

    PREPARE = "prepare"
    TEACHERS = "teachers"
    PSEUDO_LABELS = "pseudo-labels"
    COMPRESS = "compress"
    DISTILL = "distill"
    EVALUATE = "evaluate"
    EXPORT = "export"


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes to the recipe, e.g. distill.training.steps=200 workers.count=1.",
    ),
]


@app.callback()
def root(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the libraries' log as well.")
    ] = False,
) -> None:
    """Set up logging."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(message)s"
    )
    # torch.utils.benchmark loads this module, which warns of a CUDA toolkit without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


app.command("compress", short_help="Compress a network in one shot, without training.")(
    compress.command
)
app.command("compare", short_help="Compare SBF with its peers at equal cost.")(compare.command)


@app.command(short_help="Run a recipe: from images to an exported student.")
def run(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    runs: Annotated[
        Path, typer.Option(help="Folder that holds all runs; on a cluster, shared storage.")
    ] = Path("runs"),
    until: Annotated[StageName, typer.Option(help="Stop after this stage.")] = StageName.EXPORT,
    again: Annotated[
        StageName | None, typer.Option(help="Do this stage and those after it anew.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the recipe, without machine and data, and stop."),
    ] = False,
) -> None:
    """Run a recipe: prepare, teachers, pseudo-labels, compress, distill, evaluate, export.

    What is done is kept under RUNS/NAME and not done again; a run that was cut goes on from the
    last checkpoint of its stage.
    """
    recipe = recipes.load(recipe_file, overrides or ())
    runs = runs.absolute()
    folder = RunFolder(runs, recipe.name)
    if dry_run:
        check_models(recipe)
        describe(recipe)
        return
    check_surroundings(
        recipe, indexed=folder.result("prepare").exists() and again is not StageName.PREPARE
    )
    check_models(recipe)
    execute(recipe, folder, until.value, again.value if again else None)


def check_surroundings(recipe: Recipe, *, indexed: bool) -> None:
    """Refuse, before anything is started or written, a machine that is too small and images that
    are not there (unless they are `indexed` already).
    """
    from launchers.local_ray import check_machine
    from pipelines.sources.folder import check_folder

    if not os.environ.get("RAY_ADDRESS"):
        workers = recipe.workers
        check_machine(workers.count, workers.cpus, workers.gpus)
    images = recipe.data
    if (images.source == "folder" or images.expected) and not indexed:
        assert images.root is not None
        check_folder(
            images.root,
            labelled_per_class=images.labelled_per_class,
            validation=images.validation,
            seed=recipe.seed,
            split=images.split,
            unlabelled=images.unlabelled,
            expected=images.expected,
        )


def check_models(recipe: Recipe) -> None:
    """Refuse unknown models, and names of teachers that the table of results uses itself."""
    from launchers.networks import TITLES
    from sbf_dist import models

    for index, teacher in enumerate(recipe.teachers):
        if teacher.name in TITLES:
            raise UserError(
                f"teachers.{index}.name = {teacher.name!r} must not be one of {', '.join(TITLES)}"
            )
        models.build(teacher.model, classes=2)


def describe(recipe: Recipe) -> None:
    """Print what a recipe would do."""
    from launchers.networks import distill_jobs, teacher_jobs

    display = Display()
    display.say(f"recipe {recipe.name} is valid ({recipe.digest()[:12]})")
    for job in (*teacher_jobs(recipe), *distill_jobs(recipe)):
        display.say(
            f"  {job.name}: {job.model}, {job.training.steps} steps of "
            f"{job.training.batch_size} images towards {job.targets}"
        )


def execute(recipe: Recipe, folder: RunFolder, until: str, again: str | None) -> None:
    """Do the stages of a run, with its folder locked and its MLflow run open."""
    folder.root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as resources:
        resources.enter_context(locked(folder))
        # These take seconds: not before it is known that the folder is free.
        import torch

        from launchers import sequence, stages
        from launchers.local_ray import available_cpus
        from sbf_dist import tracking

        torch.set_num_threads(available_cpus())
        display = Display()
        sequence.check_identity(recipe, folder)
        if again is not None:
            sequence.forget(recipe, folder, again)
        run_id = None
        if folder.tracking.exists():
            run_id = json.loads(folder.tracking.read_text())["run_id"]
        parent = resources.enter_context(
            tracking.start(
                folder.runs,
                recipe.name,
                uri=recipe.tracking.uri,
                experiment=recipe.tracking.experiment,
                run_id=run_id,
                tags={"seed": recipe.seed, "recipe.digest": recipe.digest()},
            )
        )
        uri, run_id = parent.address
        folder.tracking.write_text(json.dumps({"uri": uri, "run_id": run_id}) + "\n")
        parent.log_params(recipe.model_dump(mode="json"))
        parent.log_artifact(folder.recipe)
        resources.enter_context(display)
        work = stages.Run(recipe, folder, display, parent, resources)
        sequence.perform(work, until)
    if folder.summary.exists():
        finish(display, folder, uri)


def finish(display: Display, folder: RunFolder, uri: str) -> None:
    """Show the table, and say where things are."""
    result = json.loads(folder.result("evaluate").read_text())
    display.console.print()
    display.console.print(results_table(result["rows"]))
    display.say(
        "MACs and parameters of zeroed channels are not counted; its latency is that of the dense "
        f"network that it is.\nLatency: one image, {result['threads']} threads, after "
        "sbf_dist.export.optimize."
    )
    here = Path.cwd()

    def near(path: Path) -> str:
        return str(path.relative_to(here) if path.is_relative_to(here) else path)

    shown = uri.replace(f"{here}/", "") if uri.startswith("sqlite:///") else uri
    display.say(
        f"\nstudent   {near(folder.student)}/ (student.onnx, weights.safetensors, plan.json)"
    )
    display.say(f"summary   {near(folder.summary)}, {near(folder.root)}/summary.png")
    program = near(Path(sys.executable).with_name("mlflow"))
    display.say(f"MLflow    {program} ui --backend-store-uri {shown}")


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Hold the run's folder for this process; the lock goes with the process, however it ends."""
    with (folder.root / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run folder {folder.root} is in use by another sbf run; wait for it, or give "
                "another name (name=…)"
            ) from None
        yield


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="sbf", standalone_mode=False)
    except (UserError, TyperException) as error:
        told = error.format_message() if isinstance(error, TyperException) else str(error)
        print(f"sbf: {told.replace('Value error, ', '')}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code)
