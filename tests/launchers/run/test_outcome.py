"""Nothing that is not finite passes the end of a training, of a measurement or of an export."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from launchers.run import outcome
from launchers.run.network import Network
from launchers.student import export_student
from sbf_dist.compression.one_shot import compress
from sbf_dist.errors import UserError
from sbf_dist.export.onnx import export_onnx, verify_onnx
from sbf_dist.files import write_json
from sbf_dist.recipe import Data
from sbf_dist.settings import Compression, View
from sbf_dist.weights import save_weights

GOOD = {"top1": 0.5, "loss": 1.0, "steps": 4, "from_step": 0}


@pytest.fixture
def network(tmp_path: Path) -> Network:
    """A network, that is trained but for its outcome."""
    network = Network(
        name="one",
        title="one",
        model="cifar_resnet8",
        view=View(image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3),
        weights=tmp_path / "weights" / "one.safetensors",
        result=tmp_path / "trainings" / "one.json",
    )
    save_weights(nn.Linear(2, 2), network.weights)
    return network


def test_a_training_is_done_once_its_outcome_is_kept(network: Network) -> None:
    assert not outcome.is_trained(network)
    outcome.keep(network, GOOD)
    assert outcome.is_trained(network)
    assert outcome.read(network) == GOOD
    network.weights.unlink()
    assert not outcome.is_trained(network)


@pytest.mark.parametrize("noted", [True, False], ids=["with a digest", "older record"])
def test_weights_that_are_damaged_are_those_of_no_training(
    network: Network, noted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    outcome.keep(network, GOOD)
    if not noted:
        write_json(network.result, GOOD)
    assert outcome.is_trained(network)
    whole = network.weights.read_bytes()
    for content in (b"", whole[:-1]) + ((whole[:-1] + b"\xff",) if noted else ()):
        caplog.clear()
        network.weights.write_bytes(content)
        assert not outcome.is_trained(network)
        assert caplog.messages == [
            f"weights {network.weights} are damaged; the training of one goes on from its last "
            "checkpoint, if there is one"
        ]
    network.weights.write_bytes(whole)
    assert outcome.is_trained(network)


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_training_whose_record_is_damaged_is_not_done(
    network: Network, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    outcome.keep(network, GOOD)
    network.result.write_text(content)
    assert not outcome.is_trained(network)
    assert f"{network.result} is damaged" in caplog.text
    outcome.keep(network, GOOD)
    assert outcome.is_trained(network)
    assert outcome.read(network) == GOOD


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_training_with_a_loss_that_is_not_finite_is_not_done(
    network: Network, loss: float
) -> None:
    with pytest.raises(UserError, match="one has diverged: after its training, loss is not finite"):
        outcome.keep(network, GOOD | {"loss": loss})
    assert not network.weights.exists()
    assert not outcome.is_trained(network)


def test_a_training_with_weights_that_are_not_finite_is_not_done(network: Network) -> None:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.bias, torch.nan)
    save_weights(layer, network.weights)
    with pytest.raises(UserError, match="one has diverged: after its training, bias is not finite"):
        outcome.keep(network, GOOD)
    assert not outcome.is_trained(network)


def test_given_weights_and_measured_figures_must_be_finite(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    outcome.check_finite("one", layer, tmp_path)
    nn.init.constant_(layer.weight, torch.inf)
    with pytest.raises(UserError, match=f"one: the weights of {tmp_path} are not finite: weight"):
        outcome.check_finite("one", layer, tmp_path)
    outcome.check_scores("one", {"top1": 0.1, "count": 3, "agreement": None})
    with pytest.raises(UserError, match="one: its kl is nan"):
        outcome.check_scores("one", {"top1": 0.1, "kl": math.nan})


def test_a_student_of_nan_is_not_exported(tmp_path: Path) -> None:
    images = torch.rand(8, 3, 8, 8)
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    student, plan = compress(dense, images, Compression(macs=0.7), name="mine")
    export_onnx(student, tmp_path / "good.onnx", None)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(torch.nan)
    assert math.isnan(verify_onnx(tmp_path / "good.onnx", student, images))
    with pytest.raises(UserError, match="its outputs for 8 images are not finite"):
        export_student(
            tmp_path / "student",
            student,
            plan,
            Data(root=tmp_path, image_size=8),
            classes=["a", "b"],
            top1=0.5,
            fidelity=None,
            images=images,
        )


def test_json_that_would_be_none_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"kl": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"kl": math.nan})
    assert json.loads(path.read_text()) == {"kl": 0.5}
