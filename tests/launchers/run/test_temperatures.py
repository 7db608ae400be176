"""Temperatures that a worker fits, and what its ensemble makes of them."""

import json
from pathlib import Path
from typing import Any

import one_worker
import pytest
import torch

from launchers.run import scoring, worker
from launchers.run.networks import Row
from launchers.run.temperatures import fit_temperatures
from sbf_dist import models
from sbf_dist.errors import UserError
from sbf_dist.recipe import Recipe
from sbf_dist.weights import load_weights, save_weights

MODEL = "cifar_resnet8_w4"


def begin(folder: Path, temperature: Any, **teacher: Any) -> worker.Context:
    given = folder / "teacher.safetensors"
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "data": {"source": "digits", "image_size": 12, "cache": "memory"},
            "teachers": [
                {"name": "one", "model": MODEL, "training": {"steps": 1}},
                {"name": "two", "model": MODEL, "weights": given} | teacher,
            ],
            "compress": {"teacher": "one", "macs": 0.5},
            "distill": {"training": {"steps": 1}},
            "pseudo_labels": {"temperature": temperature},
        }
    )
    here = one_worker.begin(recipe, folder)
    for seed, network in enumerate(here.networks.teachers):
        torch.manual_seed(seed)
        outputs = 11 if "classes" in teacher and network.name == "two" else 10
        save_weights(models.build(MODEL, outputs), network.weights)
    return here


def test_each_teacher_has_its_own_and_is_asked_with_it(tmp_path: Path) -> None:
    here = begin(tmp_path, "fit")
    fit_temperatures(here, here.networks.teachers)
    kept = json.loads(here.folder.temperatures.read_text())
    assert kept.keys() == {"one", "two"}
    assert {entry["images"] for entry in kept.values()} == {500}
    members = worker.ensemble_of(here).members
    assert [m.temperature for m in members] == [kept[m.name]["temperature"] for m in members]
    before = here.folder.temperatures.stat().st_mtime_ns
    fit_temperatures(here, here.networks.teachers)  # once is enough
    assert here.folder.temperatures.stat().st_mtime_ns == before


def test_temperatures_whose_file_is_damaged_are_fitted_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = begin(tmp_path, "fit")
    fit_temperatures(here, here.networks.teachers)
    before = here.folder.temperatures.read_text()
    here.folder.temperatures.write_text(before[:20])
    with pytest.raises(UserError, match=r"temperatures\.json is damaged: .*--again pseudo-labels"):
        worker.ensemble_of(here)
    fit_temperatures(here, here.networks.teachers)
    assert here.folder.temperatures.read_text() == before
    assert "they are fitted anew" in caplog.text


def test_a_temperature_that_is_given_is_not_fitted(tmp_path: Path) -> None:
    here = begin(tmp_path, 2.5)
    fit_temperatures(here, here.networks.teachers)
    assert not here.folder.temperatures.exists()
    assert [m.temperature for m in worker.ensemble_of(here).members] == [2.5, 2.5]


def test_a_teacher_of_other_classes_and_two_views_has_its_row_as_it_is_asked(
    tmp_path: Path,
) -> None:
    classes = tmp_path / "classes.txt"
    names = [*map(str, range(10)), "no digit"]
    classes.write_text("\n".join(names) + "\n")
    here = begin(tmp_path, 1.0, classes=classes, views=2)
    two = here.networks.teachers[1]
    scores = scoring.score(here, Row("two", "two", (two,)))
    module = models.build(MODEL, 11)

    load_weights(module, two.weights)
    module.eval()
    right = images = 0
    with torch.no_grad():
        for batch in worker.validation(here, two.view):
            answers = sum(
                module(view)[:, :10].softmax(1) for view in (batch["image"], batch["image"].flip(3))
            )
            right += int((answers.argmax(1) == batch["label"]).sum())
            images += len(batch["label"])
    assert scores.count == images == 500
    assert scores.top1 == pytest.approx(right / images)
