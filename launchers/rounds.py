"""A student that is shrunk in rounds, with training between: `compress.rounds` of a recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from launchers import networks
from launchers.display import Display
from launchers.layout import RunFolder
from launchers.student import make, progress_of
from launchers.worker import build_network
from sbf_dist import models
from sbf_dist.budget import Budget
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.cost import count
from sbf_dist.compression.plan import Plan
from sbf_dist.compression.progressive import round_budgets, shrink
from sbf_dist.recipe import Recipe


def shrink_in_rounds(
    recipe: Recipe,
    folder: RunFolder,
    dense: nn.Module,
    images: Calibration,
    display: Display,
    *,
    train: Callable[[str], Any],
) -> Path:
    """Fit, train, shrink, train, …, shrink; the last of the rounds is fitted but not trained.

    Every round keeps its plan and its weights in `folder`, and is not done again. `train` runs the
    training of a round, which it is given the name of, on the workers. Returns the file of the last
    plan.
    """
    teacher = networks.compressed_teacher(recipe)
    cost = count(dense, images.shape)
    final = recipe.compress.budget
    whole = cost.params if final.kind == "params" else cost.macs
    budgets = round_budgets(final, recipe.compress.rounds, whole)
    jobs = networks.round_jobs(recipe)
    for number, budget in enumerate(budgets, 1):
        weights = folder.weights(networks.fitted(number))
        path = folder.round_plan(number)
        if not weights.exists():
            display.say(f"  round {number} of {len(budgets)}")
            if number == 1:
                settings = recipe.compress.with_budget(budget)
                first = recipe.model_copy(update={"compress": settings})
                student, plan = make(first, dense, teacher.model, images, display)
            else:
                student, plan = _smaller(recipe, folder, number, budget, images, display)
            path.parent.mkdir(exist_ok=True)
            plan.save(path)
            models.save_weights(student, weights)  # last: what says that the round is fitted
        if number < len(budgets) and not folder.weights(networks.trained(number)).exists():
            train(networks.round_stage(jobs[number - 1]))
    return path


def files(recipe: Recipe, folder: RunFolder) -> list[Path]:
    """Return what the rounds leave in a run's folder."""
    made = []
    for number in range(1, recipe.compress.rounds + 1):
        made += [folder.round_plan(number), folder.weights(networks.fitted(number))]
    for job in networks.round_jobs(recipe):
        made += [folder.weights(job.name), folder.checkpoints / networks.round_stage(job)]
    return made


def _smaller(
    recipe: Recipe,
    folder: RunFolder,
    number: int,
    budget: Budget,
    images: Calibration,
    display: Display,
) -> tuple[nn.Module, Plan]:
    before = networks.trained(number - 1)
    student, plan = shrink(
        build_network(recipe, folder, before, start_from=before),
        Plan.load(folder.round_plan(number - 1)),
        images,
        recipe.compress.with_budget(budget),
        seed=recipe.seed,
        progress=progress_of(display),
    )
    display.say(f"  {plan.summary()}")
    return student, plan
