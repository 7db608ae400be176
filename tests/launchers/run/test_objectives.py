"""A student's training with all objectives at once, cut and gone on with: no Ray and no MLflow.

The student has other channels than the teacher that it is compared with, so that its features are
projected: no network of a small run does that by itself.
"""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import one_worker
import pytest
import torch
from torch import nn

from launchers.run.folder import RunFolder
from launchers.run.network import Network
from launchers.run.networks import Networks
from sbf_dist.recipe import Recipe
from sbf_dist.train import shards
from sbf_dist.weights import read_safetensors

STEPS = 6
CUTS = (1, 3, 5)  # in the first part, before the first step on labels alone, among these
CONTENT: dict[str, Any] = {
    "name": "taught",
    "data": {
        "source": "digits",
        "image_size": 16,
        "labelled_per_class": 4,
        "cache": "memory",
        "augmentation": {"flip": False, "mixup": 0.2},
    },
    "teachers": [
        {"name": name, "model": f"{__file__}:network", "arguments": {"width": 8},
         "training": {"steps": 1}}
        for name in ("one", "two")
    ],
    "compress": {"teacher": "two", "macs": 0.5},
    "distill": {
        "label_weight": [1.0, 0.2],
        "consistency": {"weight": [0, 1], "threshold": 0.11},
        "features": {"layers": ["2"]},
        "labels_last": {"share": 0.5, "lr": 0.2},
        "training": {
            "steps": STEPS,
            "batch_size": 16,
            "accumulation": 2,
            "ema": 0.6,
            "optimizer": {"lr": 0.05},
            "log_every": 1,
            "checkpoint_every": 1,
        },
    },
    "checkpoints": {"keep_last": STEPS},
}  # fmt: skip


def network(num_classes: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


def _student(networks: Networks, name: str) -> Network:
    """A narrower network than the teachers, from random weights."""
    student = networks.student
    assert student.job is not None
    return dataclasses.replace(
        student,
        name=name,
        arguments={"width": 6},
        plan=None,
        job=dataclasses.replace(student.job, start=None),
        weights=networks.folder.weights(name),
        result=networks.folder.training(name),
    )


def _train_all(runs: str) -> None:
    from launchers.on_ray.checkpoints import Shelf
    from launchers.on_ray.saving import Saving
    from launchers.on_ray.stopping import Stopping
    from launchers.run import training
    from launchers.run.building import build_network
    from sbf_dist.weights import save_weights

    logged = one_worker.alone()
    here = one_worker.begin(Recipe.model_validate(CONTENT), Path(runs))
    torch.manual_seed(0)
    for teacher in here.networks.teachers:
        save_weights(build_network(teacher, 10, None), teacher.weights)
    one_worker.write_pseudo_labels(here)
    whole = Path(runs, "checkpoints-whole")
    answer = {}
    for cut in (None, *CUTS):
        name = "whole" if cut is None else f"cut-{cut}"
        shelf = Shelf(Path(runs, f"checkpoints-{name}"), "whole", STEPS)
        if cut is not None:
            kept = f"whole-{cut:08d}"
            shutil.copytree(whole / kept, Path(runs, f"checkpoints-{name}", kept))
        logged.clear()
        stopping = Stopping(contextlib.nullcontext(lambda: False), 600, Path(runs, "stacks"))
        # Its checkpoints are all those of "whole".
        student = dataclasses.replace(_student(here.networks, name), name="whole")
        with Saving(shelf, stopping) as saving:
            answer[name] = training._train(here, student, saving, name, "")
        answer[name]["logged"] = {
            step: {k.removeprefix("whole/"): v for k, v in values.items()}
            for step, values in logged.items()
        }
    Path(runs, "answer.json").write_text(json.dumps(answer))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    one_worker.in_a_process(_train_all, folder)
    return folder


@pytest.fixture(scope="module")
def answer(runs: Path) -> dict[str, Any]:
    return json.loads((runs / "answer.json").read_text())


def _weights(runs: Path, name: str) -> dict[str, torch.Tensor]:
    return read_safetensors(RunFolder(runs, "taught").weights(name))


@pytest.mark.parametrize("cut", CUTS)
def test_a_training_that_was_cut_ends_with_the_same_bits(
    runs: Path, answer: dict[str, Any], cut: int
) -> None:
    assert answer[f"cut-{cut}"]["from_step"] == cut
    whole, resumed = _weights(runs, "whole"), _weights(runs, f"cut-{cut}")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_each_part_of_the_loss_is_there_as_long_as_it_is_asked_for(answer: dict[str, Any]) -> None:
    logged = answer["whole"]["logged"]
    taught = {"loss", "cross_entropy", "divergence", "consistency", "confident", "features"}
    for step in range(1, STEPS + 1):
        parts = {name for name in logged[str(step)] if name in taught}
        assert parts == (taught if step <= 3 else {"loss"})
    first = logged["1"]  # progress 0: the labels have all of their weight, consistency none
    expected = first["cross_entropy"] + first["divergence"] + first["features"]
    assert first["loss"] == pytest.approx(expected, rel=1e-4)


def test_on_labels_alone_the_rate_begins_anew_and_lower(answer: dict[str, Any]) -> None:
    rates = [answer["whole"]["logged"][str(step)]["lr"] for step in range(1, STEPS + 1)]
    assert rates == pytest.approx([0.05, 0.025, 0.0, 0.01, 0.005, 0.0])


def test_projections_are_in_checkpoints_and_their_averages_but_not_in_the_student(
    runs: Path,
) -> None:
    whole = shards.read(runs / "checkpoints-whole" / "whole-00000003" / "deepspeed/state", 1)
    added = {"features.projections.0.weight", "features.projections.0.bias"}
    assert added == {name for name in whole.weights if not name.startswith("student.")}
    assert added <= whole.ema.keys()
    assert whole.weights["features.projections.0.weight"].shape == (8, 6, 1, 1)
    assert _weights(runs, "whole").keys() == network(10, 6).state_dict().keys()


def test_what_the_teachers_are_asked_is_kept_with_its_reason(
    runs: Path, answer: dict[str, Any]
) -> None:
    result = answer["whole"]
    assert result["targets"] == "live"
    assert "cost" in result["because"]
    kept = json.loads((runs / "taught" / "trainings" / "whole.targets.json").read_text())
    assert (kept["targets"], kept["reason"]) == (result["targets"], result["because"])
