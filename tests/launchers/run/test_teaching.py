import dataclasses
import json
from pathlib import Path

import pytest
import torch

from launchers.estimate.teachers import MOST_COST, MOST_MEMORY, by_cost, by_memory
from launchers.run.folder import RunFolder
from launchers.run.networks import Networks
from launchers.run.teaching import choice_for
from launchers.run.worker import Context
from pipelines.index import DataIndex
from sbf_dist.recipe import Recipe


def test_on_a_cpu_teachers_are_live_up_to_a_cost_in_steps_of_the_student() -> None:
    step = 3 * 10.0
    assert by_cost(MOST_COST * step, 10.0).targets == "live"
    assert by_cost(MOST_COST * step + 0.1, 10.0).targets == "stored"
    assert "cost 1.7 of the student's step, limit 3" in by_cost(51.0, 10.0).reason


def test_on_a_gpu_teachers_are_live_up_to_a_share_of_its_memory() -> None:
    assert by_memory(MOST_MEMORY * 1e9, 1e9).targets == "live"
    assert by_memory(MOST_MEMORY * 1e9 + 1, 1e9).targets == "stored"
    assert "takes 4.0 GB of 80.0, limit 80%" in by_memory(4e9, 80e9).reason


def context(runs: Path, teacher: str = "cifar_resnet8", **distill: object) -> Context:
    """A worker that has no image yet; its student is a network without a plan."""
    recipe = Recipe.model_validate(
        {
            "name": "taught",
            "data": {"source": "digits", "image_size": 16},
            "teachers": [
                {"name": "small", "model": "cifar_resnet8", "training": {"steps": 1}},
                {"name": "other", "model": teacher, "training": {"steps": 1}},
            ],
            "compress": {"teacher": "small", "macs": 0.5},
            "distill": {"training": {"steps": 1}} | distill,
        }
    )
    networks = Networks.of(recipe, RunFolder(runs, "taught"))
    student = dataclasses.replace(networks.student, plan=None)
    networks = dataclasses.replace(networks, student=student)
    index = object.__new__(DataIndex)
    object.__setattr__(index, "classes", [str(number) for number in range(10)])
    return Context(networks, index, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("teacher", "expected"), [("cifar_resnet8", "live"), ("cifar_resnet110", "stored")]
)
def test_it_is_chosen_by_the_networks_of_the_recipe(tmp_path, teacher, expected):
    here = context(tmp_path, teacher)
    choice = choice_for(here, here.networks.student)
    assert choice.targets == expected


def test_what_was_chosen_holds_until_the_networks_are_others(tmp_path):
    here = context(tmp_path)
    student = here.networks.student
    assert choice_for(here, student).targets == "live"
    kept = json.loads(student.targets.read_text())
    student.targets.write_text(json.dumps(kept | {"targets": "stored", "reason": "on a GPU"}))
    choice = choice_for(here, student)
    assert (choice.targets, choice.reason) == ("stored", "on a GPU")
    larger = context(tmp_path, "cifar_resnet14")
    assert choice_for(larger, larger.networks.student).targets == "live"


@pytest.mark.parametrize("targets", ["live", "stored"])
def test_what_the_recipe_says_is_not_chosen(tmp_path, targets):
    here = context(tmp_path, "cifar_resnet110", targets=targets)
    assert choice_for(here, here.networks.student).targets == targets


def test_no_teacher_is_asked_where_none_counts(tmp_path):
    here = context(tmp_path, teacher_weight=0, consistency={})
    assert choice_for(here, here.networks.student) is None
    assert choice_for(here, here.networks.teachers[0]) is None
    by_ensemble = context(tmp_path, teacher_weight=0, consistency={"target": "ensemble"})
    assert choice_for(by_ensemble, by_ensemble.networks.student) is not None
