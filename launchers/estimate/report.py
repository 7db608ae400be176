"""What `sbf run --dry-run` prints: trainings, the memory of a worker, hours on many GPUs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from launchers.display import Display
from launchers.estimate.machines import MACHINES, Machine
from launchers.estimate.memory import Memory
from launchers.estimate.run_cost import RunCost, run_cost, training_hours
from launchers.estimate.teachers import settled
from launchers.estimate.timing import step_time
from launchers.estimate.trainings import Planned, PlannedRun, planned_run
from launchers.run.batches import sizes
from launchers.run.folder import RunFolder
from launchers.run.listed_images import check_images
from launchers.run.networks import Networks
from launchers.run.shares import expected_numbers_of_workers, numbers_of_workers
from launchers.run.stages import STAGES
from pipelines.index import DataIndex
from pipelines.sources import digits
from pipelines.sources.manifest import CLASSES
from sbf_dist.errors import UserError
from sbf_dist.recipe import Data, Recipe

GPUS = (8, 16, 64, 256, 512)
TRAINING_IMAGES = {
    "cifar10": 50_000,
    "cifar100": 50_000,
    "tiny-imagenet": 100_000,
    "imagenet": 1_281_167,
}
_ASSUMED_CLASSES = 1000


def describe(
    recipe: Recipe, folder: RunFolder, machine: str, price: float | None, display: Display
) -> None:
    """Print what a run will do and need.

    UserError: there is no such kind of machine, a folder of images that is there is laid out
    wrongly, or the workers do not divide the steps.
    """
    if machine not in MACHINES:
        known = ", ".join(MACHINES)
        raise UserError(f"--machine {machine} is not known; {known} are (docs/scaling.md)")
    images, classes = _images(recipe, folder), _classes(recipe, folder)
    workers = max(_numbers_of_workers(recipe, folder, images))
    display.say(f"recipe {recipe.name} is valid ({recipe.digest()[:12]})")
    display.say(f"stages: {', '.join(stage.name for stage in STAGES)}")
    if classes is None:
        display.say(f"the number of classes is not known yet: {_ASSUMED_CLASSES} are assumed")
    networks = Networks.of(recipe, folder)
    run = planned_run(networks, classes or _ASSUMED_CLASSES, images)
    kind = MACHINES[machine]
    pairs, on_gpus = recipe.data.augmentation.mixes, recipe.workers.gpus > 0
    memory = kind.gpu_bytes if on_gpus else None
    run, choices = settled(run, workers=workers, pairs=pairs, device_bytes=memory)
    trainings = run.trainings
    memories = {planned.name: planned.memory(workers, pairs=pairs) for planned in trainings}
    countable = images is not None and all(planned.steps is not None for planned in trainings)
    console = display.console
    for table in (
        _trainings_table(trainings, kind, workers if on_gpus and countable else None),
        _memory_table(trainings, memories, workers, pairs=pairs),
    ):
        console.print()
        console.print(table)
    for line in choices:
        display.say(line)
    if any(planned.replaced for planned in trainings):
        display.say(
            "The SBF student is estimated with all layers shrunk alike; the plan, which needs "
            "images, distributes the same cost differently."
        )
    unfit = [name for name, memory in memories.items() if memory.total > kind.gpu_bytes]
    if unfit and on_gpus:
        display.say(
            f"{', '.join(unfit)}: more than the {kind.gpu_bytes / 1e9:.0f} GB of a {kind.gpu}; "
            "set images_at_once, or use more workers"
        )
    if not on_gpus:
        display.say("Hours are estimated for workers with GPUs; this recipe has workers.gpus = 0.")
        return
    if images is None or not countable:
        display.say(
            "Hours are not estimated, as the number of images is not known; sbf run RECIPE --until "
            "prepare counts them."
        )
        return
    console.print()
    console.print(_hours_table(recipe, run, kind, images, price, workers))
    display.say(
        "Estimated from compute, images, gradients and stragglers; their accuracy is in "
        "docs/scaling.md."
        + ("" if price is not None else "\n--price USD adds the price, of a machine for an hour.")
    )


def _classes(recipe: Recipe, folder: RunFolder) -> int | None:
    if folder.result("prepare").exists():
        return int(folder.read_result("prepare")["classes"])
    if recipe.data.source == "digits":
        return digits.NUM_CLASSES
    if isinstance(recipe.data.root, Path) and recipe.data.root.is_dir():
        return check_images(recipe.data, recipe.seed)
    return CLASSES.get(recipe.data.source)


def _images(recipe: Recipe, folder: RunFolder) -> dict[str, int] | None:
    """Return the images of each part, where they are known."""
    if folder.result("prepare").exists():
        return sizes(DataIndex.load(folder.index))
    return images_of_known_set(recipe.data)


def _numbers_of_workers(
    recipe: Recipe, folder: RunFolder, images: Mapping[str, int] | None
) -> list[int]:
    if images is None:
        return expected_numbers_of_workers(recipe, folder)
    return numbers_of_workers(recipe, unlabelled=images["unlabelled"] > 0)


def images_of_known_set(data: Data) -> dict[str, int] | None:
    """Return the images of each part of a set of known content; None for another, or a list."""
    total = TRAINING_IMAGES.get(data.source)
    if total is None or data.split is not None or data.unlabelled is not None:
        return None
    per_class = data.labelled_per_class
    if per_class is None:
        return {"labelled": total, "unlabelled": 0}
    if isinstance(per_class, int):
        labelled = per_class * CLASSES[data.source]
    else:
        labelled = round(per_class * total)
    return {"labelled": labelled, "unlabelled": total - labelled}


def _table(*columns: str, title: str) -> Table:
    table = Table(title=title, box=None, pad_edge=False, title_justify="left", title_style="bold")
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:  # headings break between words, not within
        table.add_column(column, justify="right", min_width=max(map(len, column.split())))
    return table


def _trainings_table(trainings: Sequence[Planned], machine: Machine, gpus: int | None) -> Table:
    """Return a row for each; the hours are left out without a number of GPUs."""
    table = _table(
        "training",
        "MACs (G)",
        "params (M)",
        "steps",
        "images a step",
        "towards",
        *([] if gpus is None else [f"hours on {gpus} GPUs"]),
        title="Trainings",
    )
    for planned in trainings:
        cost = planned.trained.cost
        hours = [] if gpus is None else [_shown(training_hours(planned, machine, gpus))]
        table.add_row(
            planned.name,
            f"{cost.macs / 1e9:.3f}",
            f"{cost.params / 1e6:.2f}",
            planned.job.training.length if planned.steps is None else f"{planned.steps:,}",
            f"{planned.batch:,}",
            planned.towards,
            *hours,
        )
    return table


def _memory_table(
    trainings: Sequence[Planned], memories: Mapping[str, Memory], workers: int, *, pairs: bool
) -> Table:
    largest = max(memory.total for memory in memories.values())
    unit, size = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)
    table = _table(
        unit,
        *(planned.name for planned in trainings),
        title=f"Memory of one of {workers} workers",
    )
    settings = [planned.job.training for planned in trainings]
    table.add_row("ZeRO stage", *(str(training.zero_stage) for training in settings))
    table.add_row("precision", *(training.precision for training in settings))
    at_once = [
        planned.batch // workers // planned.job.training.passes(workers, pairs=pairs)
        for planned in trainings
    ]
    table.add_row("images a step", *(str(planned.batch // workers) for planned in trainings))
    table.add_row("images at once", *map(str, at_once))
    kinds = ("weights", "gradients", "optimizer", "activations", "teachers", "total")
    for kind in kinds:
        parts = [getattr(memories[planned.name], kind) for planned in trainings]
        table.add_row(kind, *(f"{part / size:.2f}" for part in parts))
    return table


def _hours_table(
    recipe: Recipe,
    run: PlannedRun,
    machine: Machine,
    images: Mapping[str, int],
    price: float | None,
    workers: int,
) -> Table:
    """Return a row for each number of GPUs; the last columns are with batches that grow."""
    longest = max(run.trainings, key=lambda planned: planned.steps or 0)
    per_gpu = max(1, longest.batch // workers)
    times = 1 + (recipe.self_training.rounds if recipe.self_training is not None else 0)
    labelling = float(times * (images["labelled"] + images["unlabelled"]))
    paid = ["USD"] if price is not None else []
    table = _table(
        "GPUs",
        "images a GPU",
        "hours",
        "machine hours",
        *paid,
        "bound by",
        f"hours, {per_gpu} a GPU",
        "machine hours",
        *paid,
        title=f"The whole run on {machine.name} ({machine.gpus} {machine.gpu})",
    )
    for gpus in GPUS:
        as_written, grown = (
            run_cost(
                run,
                machine,
                gpus,
                labelling=labelling,
                fitting_images=recipe.compress.images,
                batch_per_gpu=batch,
            )
            for batch in (None, per_gpu)
        )
        each = longest.batch / gpus
        bound = step_time(longest.work(), machine, gpus=gpus, images=each).bound
        bound = bound.replace(" ", "\N{NO-BREAK SPACE}")
        table.add_row(
            str(gpus), f"{each:g}", *_paid(as_written, price), bound, *_paid(grown, price)
        )
    return table


def _paid(cost: RunCost, price: float | None) -> list[str]:
    hours = cost.machine_hours
    money = [] if price is None else [_shown(None if hours is None else hours * price, digits=0)]
    return [_shown(cost.hours), _shown(hours), *money]


def _shown(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
