"""A run around its stages: lock, tracking, Ray, and the table of results."""

import dataclasses
import sys
from contextlib import ExitStack
from pathlib import Path

from launchers.display import Display, results_table
from launchers.interruption import Ended, Interrupted, held_back, signals_raise
from launchers.machine import available_cpus
from launchers.places import locked
from launchers.run.folder import RunFolder
from launchers.run.library_output import OwnOutput
from launchers.storage.driver import taken_over
from sbf_dist.errors import UserError
from sbf_dist.files import DISK_FAULTS
from sbf_dist.recipe import Recipe

_MLFLOW_UI = "http://127.0.0.1:5000"  # where `mlflow ui` listens


def execute(
    recipe: Recipe, folder: RunFolder, until: str, again: str | None, output: OwnOutput
) -> None:
    """Run the stages of a run, with its folder locked and its MLflow run open.

    What libraries print is kept in the folder from when it is known to be that of the recipe.

    A signal that asks this program to end leaves a run that the same command goes on with, and its
    MLflow run KILLED: one line says so, and Ended has the signal's exit code.

    UserError where a disk takes no more, whatever was to be written.
    """
    try:
        with signals_raise():
            _execute(recipe, folder, until, again, output)
    except Interrupted as signal:
        output.warn(f"sbf: stopped by {signal}; run the same command again to resume")
        raise Ended(signal.exit_code) from None
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        raise UserError(
            f"{error.filename or folder.root}: {DISK_FAULTS[error.errno]}; make room, and run the "
            "same command again"
        ) from error


def _execute(
    recipe: Recipe, folder: RunFolder, until: str, again: str | None, output: OwnOutput
) -> None:
    folder.root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as resources:
        resources.enter_context(locked(folder.root, "run"))
        kept = None
        if folder.copy is not None:
            copy, mirror = resources.enter_context(taken_over(folder.copy))
            folder, kept = dataclasses.replace(folder, copy=copy), mirror.kept
        # These take seconds: not before it is known that the folder is free.
        with held_back():
            import torch

            from launchers.images import find_again
            from launchers.run import continued_tracking, sequence
            from launchers.run.building import fetch_published
            from launchers.run.earlier_defaults import as_begun
            from launchers.run.networks import Networks
            from launchers.run.session import Session
            from launchers.run.worker_pool import WorkerPool
            from sbf_dist import tracking

        torch.set_num_threads(available_cpus())
        recipe, notes = as_begun(recipe, folder)
        continued_tracking.find_again(folder)
        networks = Networks.of(recipe, folder)
        notes += sequence.open_folder(networks, again)
        find_again(recipe.data, folder.runs, folder.index, recipe.seed)
        output.keep_in(folder.library_log)
        display = Display(output.console)
        pool = resources.enter_context(WorkerPool(recipe, folder))
        if sequence.begins_on_workers(networks, until):
            pool.begin()
        tracker = resources.enter_context(
            tracking.start(
                folder.root,
                uri=recipe.tracking.uri,
                experiment=recipe.tracking.experiment,
                tags={"seed": recipe.seed, "recipe.digest": recipe.digest()},
                kept=kept,
                address=folder.place if folder.copy is not None else "",
            )
        )
        resources.callback(pool.end)  # before the MLflow run
        if folder.copy is not None:
            resources.callback(mirror.hurry)
        params = recipe.model_dump(mode="json")
        if recipe.tracking.uri is not None:
            params["tracking"]["uri"] = tracker.uri  # without what is secret
        tracker.log_params(params)
        if folder.recipe.exists():
            tracker.log_artifact(folder.recipe)
        resources.enter_context(display)
        fetch_published(networks, display)
        if folder.copy is not None:
            say_where(display, folder, tracker.uri)
        for note in notes:
            display.say(note)
        sequence.perform(Session(networks, display, tracker, pool), until)
    # The table may be missing: its file was damaged, and the command ends before `evaluate`.
    if folder.summary.exists() and folder.result("evaluate").exists():
        show_results(display, folder, tracker.uri, tracker.page)


def say_where(display: Display, folder: RunFolder, uri: str) -> None:
    """Say where on this machine a run in an object store is worked on."""
    display.say(f"run       {folder.place}, on this machine in {folder.root}")
    if uri.startswith("sqlite:///"):
        display.say(
            f"MLflow    {uri}, on this machine only; set tracking.uri to a server to share it"
        )


def show_results(display: Display, folder: RunFolder, uri: str, page: str | None) -> None:
    """Show the table, and where the results are; page: of the run on MLflow's server."""
    result = folder.read_result("evaluate")
    display.console.print()
    display.console.print(results_table(result["rows"]))
    display.say(
        "MACs and parameters of zeroed channels are not counted; the latency in this row is that "
        f"of the dense network.\nLatency: one image, {result['threads']} threads, after "
        "sbf_dist.export.optimize."
    )
    here = Path.cwd()

    def shortened(path: Path) -> str:
        if folder.copy is not None and path.is_relative_to(folder.root):
            return f"{folder.place}/{path.relative_to(folder.root)}".removesuffix("/.")
        return str(path.relative_to(here) if path.is_relative_to(here) else path)

    shown = uri.replace(f"{here}/", "") if uri.startswith("sqlite:///") else uri
    display.say(
        f"\nstudent   {shortened(folder.student)}/ (student.onnx, weights.safetensors, README.md)"
    )
    display.say(f"summary   {shortened(folder.summary)}, {shortened(folder.root)}/summary.png")
    if folder.page.exists():  # an older version wrote none
        display.say(f"report    {shortened(folder.page)}")
    program = shortened(Path(sys.executable).with_name("mlflow"))
    served = uri.startswith(("http://", "https://"))
    if not served:
        display.say(f"MLflow    {program} ui --backend-store-uri {shown}")
    if page is not None:
        display.say(f"runs      {uri.rstrip('/') if served else _MLFLOW_UI}/{page}")
