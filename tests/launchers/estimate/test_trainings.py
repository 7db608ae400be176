"""What the trainings of a recipe do in a step, and keep, before one is begun."""

from pathlib import Path

import pytest

from launchers.estimate.machines import MACHINES
from launchers.estimate.run_cost import run_cost
from launchers.estimate.trainings import Planned, PlannedRun, planned_run
from launchers.run.folder import RunFolder
from launchers.run.networks import Networks
from sbf_dist.recipe import validate

CONTENT = {
    "name": "tiny",
    "data": {"source": "digits", "image_size": 16},
    "teachers": [{"name": "one", "model": "cifar_resnet8", "training": {"steps": 10}}],
    "compress": {"teacher": "one", "macs": 0.5},
    "distill": {"training": {"steps": 10}},
}


def planned(*overrides: str) -> PlannedRun:
    recipe = validate(CONTENT, overrides, "recipe")
    return planned_run(Networks.of(recipe, RunFolder(Path("runs"), "tiny")), 10, None)


def student(run: PlannedRun) -> Planned:
    return next(one for one in run.trainings if one.name == "sbf-distilled")


def test_a_teacher_of_two_views_is_two_passes_wherever_it_is_asked() -> None:
    once, twice = planned(), planned("teachers.0.views=2")
    before, now = student(once).work(), student(twice).work()
    assert now.frozen_macs == 2 * before.frozen_macs > 0
    assert now.frozen_layers == 2 * before.frozen_layers
    assert now.trained_macs == before.trained_macs
    teacher, same = (
        next(one for one in run.trainings if one.name == "one") for run in (once, twice)
    )
    assert teacher.work() == same.work()  # whose own training sees one
    machine = MACHINES["p5.48xlarge"]
    whole = [
        run_cost(run, machine, 8, labelling=1e12, fitting_images=1).rest for run in (once, twice)
    ]
    assert whole[1] >= whole[0]


def test_a_moving_average_takes_as_much_as_a_state_of_the_optimizer() -> None:
    without = student(planned()).state(2)
    averaged = student(planned("distill.training.ema=0.999")).state(2)
    weights = sum(p.numel() for p in student(planned()).trained.network.parameters())
    assert averaged.optimizer - without.optimizer == pytest.approx(4 * weights / 2, abs=4)
    assert averaged.total - without.total == averaged.optimizer - without.optimizer
