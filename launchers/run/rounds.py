"""A student that is shrunk in rounds, with training between: `compress.rounds` of a recipe."""

from collections.abc import Callable
from typing import Any

from torch import nn

from launchers.display import Display
from launchers.run import outcome
from launchers.run.building import build_network
from launchers.run.network import Network
from launchers.run.networks import Networks, Round
from launchers.student import make_student, progress_of
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.cost import count
from sbf_dist.compression.plan import Plan
from sbf_dist.compression.progressive import round_budgets, shrink
from sbf_dist.recipe import Compress
from sbf_dist.weights import is_whole, save_weights


def shrink_in_rounds(
    networks: Networks,
    num_classes: int,
    images: Calibration,
    display: Display,
    *,
    train: Callable[[Network], Any],
) -> None:
    """Fit, train, shrink, train, …, shrink; the last of the rounds is fitted but not trained.

    Every round keeps its plan and its weights in the run's folder, and is not done again. `train`
    trains a network of the run on the workers.
    """
    teacher, settings = networks.compressed, networks.recipe.compress
    seed = networks.recipe.seed
    dense = build_network(teacher, num_classes, teacher.weights)
    cost = count(dense, images.shape)
    whole = cost.params if settings.budget.kind == "params" else cost.macs
    budgets = round_budgets(settings.budget, settings.rounds, whole)
    before: Round | None = None
    for number, (one, budget) in enumerate(zip(networks.rounds, budgets, strict=True), 1):
        trained = one.trained is not None and outcome.is_trained(one.trained)
        # What was trained since keeps the plan that it has: its fit is not needed any more.
        if not (trained or is_whole(one.fitted.weights)):
            display.say(f"  round {number} of {len(budgets)}")
            smaller = settings.with_budget(budget)
            if before is None:
                built = teacher.architecture(num_classes)
                student, plan = make_student(dense, images, smaller, built, seed, display)
            else:
                student, plan = _shrink(before, num_classes, images, smaller, seed, display)
            one.plan.parent.mkdir(exist_ok=True)
            plan.save(one.plan)
            save_weights(student, one.fitted.weights)  # last: what says that the round is fitted
        if one.trained is not None and not trained:
            train(one.trained)
        before = one


def _shrink(
    before: Round,
    num_classes: int,
    images: Calibration,
    settings: Compress,
    seed: int,
    display: Display,
) -> tuple[nn.Module, Plan]:
    assert before.trained is not None
    student, plan = shrink(
        build_network(before.trained, num_classes, before.trained.weights),
        Plan.load(before.plan),
        images,
        settings,
        seed=seed,
        progress=progress_of(display),
    )
    display.say(f"  {plan.summary()}")
    return student, plan
