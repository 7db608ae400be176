import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny_run import do, networks_of

from launchers.estimate.teachers import MOST_COST, MOST_MEMORY, Choice, by_cost, by_memory
from launchers.run import sequence, training
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


def context(
    runs: Path, teacher: str = "cifar_resnet8", *, views: int = 1, **distill: object
) -> Context:
    """A worker that has no image yet; its student is a network without a plan."""
    trained = {"training": {"steps": 1}}
    recipe = Recipe.model_validate(
        {
            "name": "taught",
            "data": {"source": "digits", "image_size": 16},
            "teachers": [
                {"name": "small", "model": "cifar_resnet8", "views": views} | trained,
                {"name": "other", "model": teacher, "views": views} | trained,
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


def test_a_choice_whose_file_is_damaged_is_made_anew_with_a_warning(tmp_path, caplog):
    here = context(tmp_path)
    student = here.networks.student
    before = choice_for(here, student)
    whole = student.targets.read_text()
    student.targets.write_text(whole[:9])
    assert choice_for(here, student) == before
    assert student.targets.read_text() == whole
    assert f"{student.targets} is damaged" in caplog.text
    assert "whether teachers are asked live is decided anew" in caplog.text


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


def test_a_teacher_that_is_asked_about_two_views_costs_twice(tmp_path):
    reasons = [
        choice_for(here, here.networks.student).reason
        for here in (context(tmp_path / str(views), views=views) for views in (1, 2))
    ]
    assert "cost 0.7 of" in reasons[0]
    assert "cost 1.3 of" in reasons[1]


def test_the_use_of_a_device_counts_views_and_on_labels_alone_no_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "peak_macs_per_s", lambda *_: 1.0)
    found = []
    for views in (1, 2):
        here = context(tmp_path, views=views, labels_last={"share": 0.4}, consistency={})
        student = here.networks.student
        found.append(training._shares_of_peak(here, student, student.job, Choice("live", "")))
    (once, alone), (twice, same) = found
    own = alone / 3  # of a forward pass of each of the three networks, which are the same
    assert same == alone
    assert once == pytest.approx((2 * 3 + 2) * own)
    assert twice == pytest.approx((2 * 3 + 4) * own)


def test_what_was_chosen_goes_with_the_training_but_not_if_that_is_only_longer(tmp_path):
    before = networks_of(tmp_path)
    do(before, *sequence.NAMES)
    kept = before.student.targets
    kept.write_text("{}")
    sequence.open_folder(networks_of(tmp_path, "distill.training.steps=20"), "distill")
    assert kept.exists()
    sequence.open_folder(networks_of(tmp_path, "distill.consistency={}"), "distill")
    assert not kept.exists()


def test_what_was_chosen_goes_with_rounds_and_self_training(tmp_path):
    twice = ("compress.rounds=2", "self_training={}")
    before = networks_of(tmp_path, *twice)
    do(before, *sequence.NAMES)
    networks = [*before.self_trained, *(one.trained for one in before.rounds if one.trained)]
    for network in networks:
        network.targets.write_text("{}")
    sequence.open_folder(before, "distill")
    assert len(networks) == 2
    assert not any(network.targets.exists() for network in networks)
