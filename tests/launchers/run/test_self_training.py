"""Rounds in which the student becomes a teacher: their networks, and what their workers see."""

import dataclasses
from pathlib import Path
from typing import Any

import one_worker
import pytest
import torch

from launchers.run import locks, stages, worker
from launchers.run.folder import RunFolder
from launchers.run.networks import Networks, is_name_of_round, labels_of
from sbf_dist import compress, models
from sbf_dist.recipe import Recipe
from sbf_dist.weights import save_weights

MODEL = "cifar_resnet8_w4"
CONTENT = {
    "name": "tiny",
    "seed": 5,
    "data": {"source": "digits", "image_size": 12, "cache": "memory", "labelled_per_class": 5},
    "teachers": [
        {"name": name, "model": MODEL, "training": {"steps": 2, "batch_size": 8}}
        for name in ("one", "two")
    ],
    "compress": {"teacher": "one", "macs": 0.6},
    "distill": {"training": {"steps": 2, "batch_size": 8}},
}


def recipe_of(**settings: Any) -> Recipe:
    return Recipe.model_validate(CONTENT | ({"self_training": settings} if settings else {}))


def networks_of(folder: Path = Path("/runs"), **settings: Any) -> Networks:
    return Networks.of(recipe_of(**settings), RunFolder(folder, "tiny"))


def test_without_rounds_a_run_is_what_it_was_before_there_were_any() -> None:
    networks = networks_of()
    assert networks.self_trained == ()
    assert networks.exported == networks.student
    assert "self_training" not in networks.recipe.identity()
    assert networks.in_group("distill") == networks


def test_each_round_is_a_training_of_its_own_from_the_same_compressed_network() -> None:
    networks = networks_of(rounds=2)
    first, second = networks.self_trained
    assert [n.name for n in (first, second)] == ["sbf-self-trained-1", "sbf-self-trained-2"]
    assert all(is_name_of_round(n.name) for n in (first, second))
    student = networks.student
    for number, network in enumerate((first, second), 1):
        assert network.job is not None and student.job is not None
        assert network.job.start == student.job.start
        assert network.plan == student.plan
        assert network.job.seed == 5 + number
        assert networks.trained_in(network.job.group) == [network]
    assert len({n.weights for n in (student, first, second)}) == 3
    assert networks.exported == second
    assert [row.name for row in networks.rows()][-3:] == [student.name, first.name, second.name]


@pytest.mark.parametrize(
    ("settings", "teachers"),
    [
        ({"rounds": 2}, [["one", "two", "sbf-distilled"], ["one", "two", "sbf-self-trained-1"]]),
        ({"rounds": 2, "with_teachers": False}, [["sbf-distilled"], ["sbf-self-trained-1"]]),
    ],
)
def test_the_student_before_joins_the_teachers_or_takes_their_place(
    settings: dict[str, Any], teachers: list[list[str]]
) -> None:
    networks = networks_of(**settings, weight=3.0)
    for network, expected in zip(networks.self_trained, teachers, strict=True):
        assert network.job is not None
        for group in (network.job.group, labels_of(network)):
            seen = networks.in_group(group)
            assert [teacher.name for teacher in seen.teachers] == expected
            assert seen.teachers[-1].asked.weight == 3.0
            assert seen.folder.pseudo_labels.name == labels_of(network)
            assert seen.trained_in(network.job.group) == [network]
    assert networks.in_group("distill").teachers == networks.teachers


def products(networks: Networks) -> dict[str, locks.Product]:
    return {p.name: p for stage in stages.STAGES for p in stage.products(networks)}


def changed(before: Recipe, now: Networks) -> set[str]:
    """What a changed recipe makes stale, in a run that is done."""
    old = locks.values_of(before.identity())
    new = locks.values_of(now.recipe.identity())
    found = products(now)
    stale = [name for name, product in found.items() if locks.changes(old, new, product)]
    return locks.with_dependants(stale, found.values())


LATER = {"the self-training", "the table of results", "the exported student"}


@pytest.mark.parametrize(
    ("before", "now", "stale"),
    [
        ({}, {"rounds": 1}, LATER | {"sbf-self-trained-1"}),
        ({"rounds": 1}, {"rounds": 2}, LATER),
        ({"rounds": 2}, {"rounds": 1}, LATER),
        ({"rounds": 1}, {}, LATER),
        (
            {"rounds": 1},
            {"rounds": 1, "weight": 2},
            LATER - {"the self-training"} | {"sbf-self-trained-1"},
        ),
    ],
)
def test_a_changed_number_of_rounds_repeats_no_training_that_is_done(
    before: dict[str, Any], now: dict[str, Any], stale: set[str]
) -> None:
    assert changed(recipe_of(**before), networks_of(**now)) == stale


def test_a_round_depends_on_the_one_before() -> None:
    found = products(networks_of(rounds=2))
    stale = locks.with_dependants(["sbf-distilled"], found.values())
    assert {"sbf-self-trained-1", "sbf-self-trained-2"} <= stale
    files = found["sbf-self-trained-1"].files
    assert {"pseudo-labels-sbf-self-trained-1", "distill-sbf-self-trained-1"} <= {
        file.name for file in files
    }


def test_a_round_is_labelled_by_its_own_teachers_and_trained_on_these_labels(
    tmp_path: Path,
) -> None:
    here = one_worker.begin(recipe_of(rounds=1), tmp_path)
    networks = here.networks
    for seed, teacher in enumerate(networks.teachers):
        torch.manual_seed(seed)
        save_weights(models.build(MODEL, 10), teacher.weights)
    torch.manual_seed(9)
    images = torch.randn(16, 3, 12, 12)
    student, plan = compress(models.build(MODEL, 10).eval(), images, macs=0.6, sources=1)
    plan.save(networks.folder.plan)
    save_weights(student, networks.one_shot.weights)
    save_weights(student, networks.student.weights)
    (network,) = networks.self_trained

    def at(group: str) -> worker.Context:
        return dataclasses.replace(here, networks=networks.in_group(group))

    one_worker.write_pseudo_labels(here)
    one_worker.write_pseudo_labels(at(labels_of(network)))
    assert network.job is not None
    inside = at(network.job.group)
    assert inside.folder.pseudo_labels != here.folder.pseudo_labels
    view = here.recipe.data.view
    each = [
        worker.ensemble_of(here, [teacher])(images, view) for teacher in inside.networks.teachers
    ]
    assert len(each) == 3
    said = worker.ensemble_of(inside)(images, view)
    torch.testing.assert_close(said, torch.stack(each).mean(0))
    records = one_worker.train(inside, network)
    assert network.weights.exists()
    assert all("divergence" in record.parts for record in records)
