"""A training of a run on its only worker, in a process of its own: no Ray and no MLflow.

Over Ray: test_recovery.py.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import one_worker
import pytest
import torch
from torch import nn

from launchers.run.building import build_network
from launchers.run.folder import RunFolder
from launchers.run.networks import Networks
from sbf_dist.recipe import Recipe
from sbf_dist.train import checkpoint, shards
from sbf_dist.train.manifest import read_manifest

TRAINING = {"batch_size": 64, "optimizer": {"lr": 0.05}, "log_every": 1, "precision": "fp32"}
TRAININGS: dict[str, dict[str, Any]] = {
    "averaged": TRAINING
    | {"epochs": 0.2, "warmup_epochs": 0.05, "zero_stage": 3, "ema": 0.6, "images_at_once": 16},
    "compiled": TRAINING | {"steps": 3, "compile": True},
    "plain": TRAINING | {"steps": 3},
    "evaluated": TRAINING | {"steps": 3, "checkpoint_every": 1},
    "finetuned": TRAINING
    | {
        "steps": 3,
        "zero_stage": 2,
        "freeze": ["0.*", "1.*"],
        "optimizer": {"lr": 0.05, "body_lr_share": 0.5},
    },
}
START = "published.pth"  # of five classes, beside the runs
CONTENT = {
    "name": "tiny",
    "data": {"source": "digits", "image_size": 16, "cache": "memory"},
    "teachers": [
        {"name": name, "model": f"{__file__}:small_network", "training": training}
        for name, training in TRAININGS.items()
    ],
    "compress": {"teacher": "plain", "macs": 0.5},
    "distill": {"training": {"steps": 1}},
    "checkpoints": {"keep_last": 3, "keep_best": True},
}


def small_network(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


def _train_all(runs: str) -> None:
    from launchers.on_ray.checkpoints import Shelf
    from launchers.on_ray.saving import Saving
    from launchers.on_ray.stopping import Stopping
    from launchers.run import training

    logged = one_worker.alone()
    torch.save(small_network(5).state_dict(), Path(runs, START))
    here = one_worker.begin(Recipe.model_validate(CONTENT), Path(runs))
    answer: dict[str, Any] = {}
    for teacher in here.networks.teachers:
        logged.clear()
        # As if each were the first and only one: the same random weights.
        object.__setattr__(teacher.job, "seed", 0)
        if teacher.name == "finetuned":
            object.__setattr__(teacher.job, "start", Path(runs, START))
            object.__setattr__(teacher, "published", Path(runs, START))
        stopping = Stopping(contextlib.nullcontext(lambda: False), 600, Path(runs, "stacks"))
        shelf = Shelf(Path(runs, "checkpoints"), teacher.name, 3, keep_best=True)
        with Saving(shelf, stopping) as saving:
            answer[teacher.name] = training._train(here, teacher, saving, teacher.name, "")
        answer[teacher.name]["logged"] = dict(logged)
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
    networks = Networks.of(Recipe.model_validate(CONTENT), RunFolder(runs, "tiny"))
    network = next(network for network in networks if network.name == name)
    return build_network(network, 10, network.weights).state_dict()


def test_a_training_given_in_epochs_has_the_steps_that_the_images_make(
    answer: dict[str, Any],
) -> None:
    averaged = answer["averaged"]
    assert averaged["steps"] == 5  # 0.2 x 1,297 images / 64
    rates = [averaged["logged"][str(step)]["averaged/lr"] for step in range(1, 6)]
    assert rates[0] == pytest.approx(0.025)  # two steps of warm-up
    assert rates[1] == pytest.approx(0.05)
    assert averaged["logged"]["5"]["averaged/top1"] == averaged["top1"]


def test_the_average_is_what_is_saved_and_the_checkpoint_holds_both(
    answer: dict[str, Any], runs: Path
) -> None:
    folder = runs / "checkpoints" / "averaged-00000005"
    checkpoint.verify(folder)
    written = checkpoint.written(folder)
    assert written is not None
    assert (written.zero_stage, written.optimizer) == (3, "SGD")
    assert written.reads["teachers.0.training.ema"] == 0.6
    whole = shards.read(folder / "deepspeed/state", 1)
    saved = _weights(runs, "averaged")
    for name, value in saved.items():
        assert torch.equal(value, whole.ema[f"student.{name}"])
    assert any(not torch.equal(v, whole.weights[f"student.{n}"]) for n, v in saved.items())


def test_a_compiled_network_trains_as_it_does_otherwise_and_is_saved_alike(
    answer: dict[str, Any], runs: Path
) -> None:
    compiled, plain = answer["compiled"]["logged"], answer["plain"]["logged"]
    for step in "123":
        expected = plain[step]["plain/loss"]
        assert compiled[step]["compiled/loss"] == pytest.approx(expected, rel=1e-3)
    found, expected = _weights(runs, "compiled"), _weights(runs, "plain")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3)


def test_the_share_of_the_devices_arithmetic_that_is_used_is_logged(answer: dict[str, Any]) -> None:
    shares = [values["plain/mfu"] for values in answer["plain"]["logged"].values()]
    assert len(shares) == 3
    assert all(0 < share < 1 for share in shares)


def test_evaluating_each_checkpoint_scores_it_and_changes_nothing_in_the_training(
    runs: Path, answer: dict[str, Any]
) -> None:
    names = [f"evaluated-{step:08d}" for step in (1, 2, 3)]
    top1s = [read_manifest(runs / "checkpoints" / name).top1 for name in names]
    assert all(top1 is not None and 0 <= top1 <= 1 for top1 in top1s)
    assert top1s[-1] == answer["evaluated"]["top1"]
    logged = answer["evaluated"]["logged"]
    assert [logged[str(step)]["evaluated/top1"] for step in (1, 2, 3)] == top1s
    plain, evaluated = (_weights(runs, name) for name in ("plain", "evaluated"))
    assert all(torch.equal(plain[name], evaluated[name]) for name in plain)


def test_a_teacher_starts_from_published_weights_and_its_frozen_layers_keep_them(
    runs: Path,
) -> None:
    published = torch.load(runs / START)
    found = _weights(runs, "finetuned")
    assert found["5.weight"].shape == (10, 32)  # the published head has five classes
    for name, value in published.items():
        if name.startswith(("0.", "1.")):  # statistics of the batch norm among them
            assert torch.equal(found[name], value), name
    plain = _weights(runs, "plain")
    assert not torch.equal(plain["1.running_mean"], published["1.running_mean"])
