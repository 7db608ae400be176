"""Networks of a run with weights from elsewhere, and teachers as members of an ensemble."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from launchers.run import work
from launchers.run.building import build_member, build_network, fetch_published
from launchers.run.folder import RunFolder
from launchers.run.networks import Networks
from launchers.run.read_files import file_digests
from sbf_dist import models
from sbf_dist.errors import UserError
from sbf_dist.recipe import Recipe

CLASSES = ["cat", "dog", "emu"]
MODEL = "torchvision:squeezenet1_1"
TRAINING = {"steps": 5}


def networks_of(runs: Path, **teacher: Any) -> Networks:
    content = {
        "name": "tiny",
        "data": {"source": "digits", "image_size": 64},
        "teachers": [
            {"name": "student", "model": "cifar_resnet8_w4", "training": TRAINING},
            {"name": "one", "model": "cifar_resnet8_w4"} | teacher,
        ],
        "compress": {"teacher": "one" if "training" in teacher else "student", "macs": 0.5},
        "distill": {"training": TRAINING},
        "baselines": TRAINING,
    }
    return Networks.of(Recipe.model_validate(content), RunFolder(runs, "tiny"))


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A file of published weights of seven classes, in two state dicts."""
    states = {
        name: models.build("cifar_resnet8_w4", 7).state_dict() for name in ("model", "model_ema")
    }
    torch.save(states, tmp_path / "start.pth")
    return tmp_path / "start.pth"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("student", r"; remove stages/teachers\.json .*\(--again teachers\)$"),
        ("sbf-round-2", r"; remove stages/distill\.json .*\(--again distill\)$"),
        ("sbf-one-shot", r"; make them anew \(--again compress\)$"),
    ],
)
def test_weights_of_the_run_that_are_damaged_say_what_makes_them_anew(
    tmp_path: Path, name: str, remedy: str
) -> None:
    network = networks_of(tmp_path, training=TRAINING).teachers[0]
    weights = network.weights.with_name(f"{name}.safetensors")
    for fault in ("do not exist", "are damaged"):
        with pytest.raises(UserError, match=rf"{name}\.safetensors {fault}{remedy}"):
            build_network(network, 3, weights)
        weights.parent.mkdir(exist_ok=True, parents=True)
        weights.write_bytes(b"")


def test_a_training_and_its_baseline_start_from_the_file_and_what_follows_is_the_runs_own(
    tmp_path: Path, start: Path
) -> None:
    networks = networks_of(tmp_path, training=TRAINING, start_from=start, weights_key="model_ema")
    one, dense = networks.teachers[1], networks.dense_labels
    assert dense is not None
    wanted = torch.load(start)["model_ema"]["conv.weight"]
    for network in (one, dense):
        assert network.job is not None
        assert network.job.start == start
        assert network.weights == networks.folder.weights(network.name)
        said: list[str] = []
        built = build_network(network, 3, network.job.start, said.append)
        assert torch.equal(built.state_dict()["conv.weight"], wanted)
        assert "taken from 'model_ema', head head reinitialised: 7 classes in the file" in said[0]
        assert "teachers.1.start_from" in network.reads
    assert "teachers.1.start_from.sha256" in file_digests(networks.recipe)


def test_two_state_dicts_that_fit_are_refused_where_none_is_chosen(
    tmp_path: Path, start: Path
) -> None:
    one = networks_of(tmp_path, training=TRAINING, start_from=start).teachers[1]
    with pytest.raises(UserError, match="hold 2 state dicts that fit, model, model_ema: choose"):
        build_network(one, 3, start)


def test_weights_that_are_taken_as_they_are_keep_their_head(tmp_path: Path, start: Path) -> None:
    one = networks_of(tmp_path, weights=start, weights_key="model").teachers[1]
    assert one.weights == start
    with pytest.raises(UserError, match="a head of 7 outputs for 3"):
        build_network(one, 3, start)


def test_published_weights_are_fetched_once_and_kept_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    cached.parent.mkdir(parents=True)
    published = torchvision.models.squeezenet1_1().state_dict()
    torch.save(published, cached)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    networks = networks_of(tmp_path, model=MODEL, training=TRAINING, pretrained=True)
    one, lines = networks.teachers[1], []
    display: Any = SimpleNamespace(say=lines.append)
    fetch_published(networks, display)
    cached.unlink()
    fetch_published(networks, display)
    assert lines == [f"one: fetching the published weights of {MODEL}"]
    assert one.job is not None
    assert one.job.start is not None
    assert one.job.start.is_relative_to(networks.folder.root)
    said: list[str] = []
    built = build_network(one, 3, one.job.start, said.append)
    assert "head classifier.1 reinitialised: 1000 classes in the file, 3 in the network" in said[0]
    name = "features.0.weight"
    assert torch.equal(built.state_dict()[name], published[name])


def test_another_normalisation_than_the_published_weights_expect_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "launchers.run.building.build_pretrained", lambda name, arguments: nn.Linear(2, 2)
    )
    lines: list[str] = []
    display: Any = SimpleNamespace(say=lines.append)
    networks = networks_of(tmp_path, model="timm:test_resnet", pretrained=True, training=TRAINING)
    fetch_published(networks, display)
    (warning,) = lines[1:]
    assert warning.startswith("warning: one: its published weights expect mean [0.5, 0.5, 0.5]")
    assert warning.endswith("see teachers.1.mean")


def test_a_teacher_of_other_classes_is_built_with_them_and_mapped(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\nhound\tdog\nwhale\nemu\n")
    torch.save(models.build("cifar_resnet8_w4", 4).state_dict(), tmp_path / "four.pth")
    networks = networks_of(
        tmp_path, weights=tmp_path / "four.pth", classes=tmp_path / "classes.txt", views=2, weight=3
    )
    member = build_member(networks.teachers[1], CLASSES)
    assert (member.name, member.views, member.weight) == ("one", 2, 3.0)
    assert member.mapping is not None
    assert member.mapping.targets.tolist() == [0, 1, 2]
    assert member.network.head.out_features == 4
    assert {"teachers.1.classes.sha256", "teachers.1.weights.sha256"} <= set(
        file_digests(networks.recipe)
    )


def checked(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the stage of the teachers says before it trains them."""
    lines: list[str] = []
    session = SimpleNamespace(
        networks=networks,
        num_classes=len(CLASSES),
        folder=SimpleNamespace(index=None),
        display=SimpleNamespace(say=lines.append),
    )
    index = SimpleNamespace(classes=CLASSES)
    monkeypatch.setattr(work, "DataIndex", SimpleNamespace(load=lambda folder: index))
    monkeypatch.setattr(work, "_train", lambda *_: {})
    work.train_teachers(session, None)  # type: ignore[arg-type]
    return lines


def test_the_stage_says_what_each_teacher_begins_with(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = {"lr": 0.2, "body_lr_share": 0.1}
    training = TRAINING | {"freeze": ["conv.*"], "optimizer": slow}
    networks = networks_of(tmp_path, training=training, start_from=start, weights_key="model")
    weights, rates, frozen = checked(networks, monkeypatch)
    assert weights.startswith(
        f"  one: weights {start}: taken from 'model', head head reinitialised"
    )
    assert rates == "  one: learning rate 0.2 for the head, head, and 0.02 for all else"
    assert frozen.startswith("  one: 1 of ")
    (rates,) = checked(networks_of(tmp_path, training=TRAINING | {"optimizer": slow}), monkeypatch)
    assert rates.endswith("it starts from random weights: body_lr_share = 1 would suit it better")


def test_which_part_of_a_nested_file_of_given_weights_was_taken_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = models.build("cifar_resnet8_w4", 3)
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"epoch": 3, "model_ema": state}, tmp_path / "teacher.pth")
    (line,) = checked(networks_of(tmp_path, weights=tmp_path / "teacher.pth"), monkeypatch)
    assert line.startswith("  one: ")
    assert line.endswith("taken from 'model_ema', names without 'module.'")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("classes", "predicts 3 classes, its file of classes has 4"),
        ("answers", "teacher one: its predictions are not finite numbers"),
    ],
)
def test_a_teacher_that_is_taken_as_it_is_is_asked_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        f"        return super().forward(x.mean((2, 3))) / {0 if fault == 'answers' else 1}\n"
        "def net():\n"
        "    return Net(3, 3)\n"
    )
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "three.pth")
    (tmp_path / "classes.txt").write_text("cat\ndog\nemu\nwhale\n")
    classes = {"classes": tmp_path / "classes.txt"} if fault == "classes" else {}
    own = {"model": f"{tmp_path}/own.py:net", "weights": tmp_path / "three.pth"}
    with pytest.raises(UserError, match=message):
        checked(networks_of(tmp_path, **own, **classes), monkeypatch)
