"""`sbf run`: a recipe, from images to an exported student."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launchers.machine import check_machine, warn_of_idle_gpus
from launchers.places import check_store, check_writable
from launchers.run.folder import RunFolder
from launchers.run.library_output import kept_apart
from launchers.run.stages import STAGES, check_order
from sbf_dist import recipe as recipes
from sbf_dist.errors import UserError
from sbf_dist.recipe import Data, Recipe
from sbf_dist.tracking import tracking_address

if TYPE_CHECKING:
    from torch import nn

StageName = StrEnum("StageName", [(s.name, s.name) for s in STAGES])  # type: ignore[misc]
LAST_STAGE = StageName(STAGES[-1].name)
DEFAULT_MACHINE = "p5.48xlarge"
HELP = f"""Run a recipe: {", ".join(stage.name for stage in STAGES)}.

Finished stages are kept in RUNS/NAME and not repeated. An interrupted run resumes from the last
checkpoint. After changing a setting that a finished stage depends on, give --again STAGE.

\b
{chr(10).join(f"{stage.name:<14} {stage.summary}" for stage in STAGES)}
"""


def command(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Overrides of recipe keys, e.g. distill.training.steps=200 workers.count=1.",
        ),
    ] = None,
    runs: Annotated[
        str,
        typer.Option(
            help="Folder that holds all runs; on a cluster, storage that all machines share, or an "
            "object store: s3://BUCKET/runs (or gs://, abfs://)."
        ),
    ] = "runs",
    until: Annotated[StageName, typer.Option(help="Stop after this stage.")] = LAST_STAGE,
    again: Annotated[
        StageName | None,
        typer.Option(
            help="Repeat this stage and those after it; after a change of the recipe, only what "
            "the change affects."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the recipe, but not this machine and the data; print the trainings, the "
            "memory that a worker needs, and hours on 8 to 512 GPUs; stop.",
        ),
    ] = False,
    machine: Annotated[
        str | None,
        typer.Option(
            help=f"With --dry-run: machine type for the estimate. Default: {DEFAULT_MACHINE}."
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(min=0, help="With --dry-run: price of such a machine, USD per hour."),
    ] = None,
) -> None:
    """Run a recipe, as HELP says."""
    if not dry_run:
        for option, value in (("--machine", machine), ("--price", price)):
            if value is not None:
                raise UserError(f"{option} {value}: needs --dry-run")
    check_order(until.value, again.value if again else None)
    recipe = recipes.load(recipe_file, overrides or ())
    folder = RunFolder.at(runs, recipe.name)
    tracking_address(folder.runs, recipe.tracking.uri)
    if dry_run:
        check_models(recipe)
        from launchers.display import Display
        from launchers.estimate.report import describe

        describe(recipe, folder, machine or DEFAULT_MACHINE, price, Display())
        return
    if folder.copy is not None:
        check_store("--runs", folder.place_of_runs)
    check_writable("--runs", folder.runs)
    with kept_apart() as output:
        prepare = STAGES[0].name
        classes = check_surroundings(recipe, indexed=again != prepare and folder.is_done(prepare))
        check_models(recipe, classes)
        if again != prepare:  # what is known of the images is of the run before
            from launchers.run.shares import expected_numbers_of_workers

            expected_numbers_of_workers(recipe, folder)
        check_weights(recipe, folder, classes)
        if not os.environ.get("RAY_ADDRESS"):
            warn_of_idle_gpus(recipe.workers.gpus)
        # These take seconds to import: not before the command line is known to be right.
        from launchers.run.execution import execute

        execute(recipe, folder, until.value, again.value if again else None, output)


def check_surroundings(recipe: Recipe, *, indexed: bool) -> int | None:
    """Refuse, before anything is started or written, a machine that is too small and images that
    are not there (unless they are `indexed` already).

    Returns the number of classes, where it is known without writing an embedded set.
    """
    from launchers.run.listed_images import check_images

    check_ray_address(os.environ.get("RAY_ADDRESS"))
    here = not os.environ.get("RAY_ADDRESS")
    if here:
        workers = recipe.workers
        check_machine(workers.least, workers.cpus, workers.gpus)
    images = recipe.data
    if (images.source == "folder" or images.expected) and not indexed:
        classes = check_images(images, recipe.seed)
        check_shard_cache(images, workers_are_here=here)
        return classes
    return None


def check_shard_cache(images: Data, *, workers_are_here: bool) -> None:
    """Refuse a cache that cannot hold one shard of an object store, as far as is known here."""
    from pipelines.remote.shard_cache import ShardCache
    from pipelines.roots import root_of
    from pipelines.sources.manifest import read_manifest

    if not isinstance(images.root, str):
        return
    cache = ShardCache.at(images.cache_dir, images.cache_gb)
    largest = max(int(shard["bytes"]) for shard in read_manifest(root_of(images.root)).shards)
    if workers_are_here:
        cache.check(largest)
    else:
        cache.check_gigabytes(largest)


def check_ray_address(address: str | None) -> None:
    """UserError for a malformed RAY_ADDRESS, which Ray would try to reach for minutes."""
    if address in (None, "auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port[:6]) < 2**16:
        raise UserError(
            f"RAY_ADDRESS = {address!r} must look like HOST:6379; unset it to start a local Ray"
        )


def check_weights(recipe: Recipe, folder: RunFolder, classes: int | None) -> None:
    """Refuse weights that are not there, and those that do not fit, where `classes` are known."""
    from launchers.run.building import build_network
    from launchers.run.networks import Networks
    from launchers.run.outcome import check_finite
    from launchers.run.read_files import file_digests

    file_digests(recipe)
    for teacher, network in zip(recipe.teachers, Networks.of(recipe, folder).teachers, strict=True):
        if network.published is None or teacher.pretrained or classes is None:
            continue
        model = build_network(network, classes, network.published)
        check_finite(network.name, model, network.published)


def check_models(recipe: Recipe, classes: int | None = None) -> None:
    """Refuse unknown models, patterns of no parameter, layers that are not there, and names that
    the run uses itself; where the number of `classes` is known, also another one.
    """
    from launchers.run.network import ENDING_OF_TARGETS
    from launchers.run.networks import TITLES, is_name_of_round
    from sbf_dist import models
    from sbf_dist.compression.inputs import check_takes_images_alone
    from sbf_dist.train.freezing import frozen_names

    for index, teacher in enumerate(recipe.teachers):
        if teacher.name in TITLES or is_name_of_round(teacher.name):
            raise UserError(
                f"teachers.{index}.name = {teacher.name!r} must not be one of "
                f"{', '.join(TITLES)}, nor sbf-round-N or sbf-self-trained-N"
            )
        if teacher.name.endswith(ENDING_OF_TARGETS):
            raise UserError(
                f"teachers.{index}.name = {teacher.name!r} must not end in {ENDING_OF_TARGETS}, as "
                "a file of another network may"
            )
        try:
            model = models.build(teacher.model, 2, teacher.arguments)
        except UserError as error:
            raise UserError(f"teachers.{index}: {error}") from error.__cause__
        check_takes_images_alone(model, f"teachers.{index}.model = {teacher.model!r}")
        outputs = teacher.arguments.get("num_classes", classes)
        if classes is not None and teacher.classes is None and outputs != classes:
            raise UserError(
                f"teachers.{index}.arguments.num_classes = {outputs!r} must be {classes}, the "
                "number of classes of the images"
            )
        if teacher.training is not None:
            key = f"teachers.{index}.training.freeze"
            frozen_names(model, teacher.training.freeze, key=key)
        if teacher.name == recipe.compress.teacher:
            _check_student(recipe, model)


def _check_student(recipe: Recipe, dense: "nn.Module") -> None:
    """Refuse patterns and layers that neither the dense network nor a student of it has."""
    from launchers.estimate.student import even_student
    from sbf_dist.distill.features import feature_loss
    from sbf_dist.train.freezing import frozen_names, matching

    shape = (3, recipe.data.image_size, recipe.data.image_size)
    if recipe.baselines is not None:
        frozen_names(dense, recipe.baselines.freeze, key="baselines.freeze")
    if recipe.distill.features is not None:
        feature_loss(dense, dense, recipe.distill.features.layers, shape)
    if recipe.distill.training.freeze:
        # Which layers become SBF layers, whose parameters have names of their own, is for the plan.
        both = (dense, even_student(dense, recipe.compress, shape))
        names = dict.fromkeys(name for model in both for name, _ in model.named_parameters())
        matching(list(names), recipe.distill.training.freeze, key="distill.training.freeze")
