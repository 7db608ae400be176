"""Weights that a training starts from: the head may differ, and nothing else."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from sbf_dist import models
from sbf_dist.errors import UserError
from sbf_dist.weights import load_weights


class Own(nn.Module):
    """A network of the user's, whose head is not its last linear layer."""

    def __init__(self, classes: int, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.answer = nn.Linear(width, classes)
        self.late = nn.Linear(width, 5)


BUILDERS = {
    "cifar": (lambda classes: models.build("cifar_resnet8_w4", classes), "head"),
    "timm": (lambda classes: models.build("timm:test_resnet", classes), "fc"),
    "torchvision": (lambda c: models.build("torchvision:squeezenet1_1", c), "classifier.1"),
    "own": (Own, "answer"),
}


def file_of(network: nn.Module, folder: Path, prefix: str = "", key: str = "") -> Path:
    state = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, folder / "weights.pth")
    return folder / "weights.pth"


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_head_of_other_classes_stays_as_it_was_drawn_and_all_else_is_loaded(
    kind: str, tmp_path: Path
) -> None:
    build, head = BUILDERS[kind]
    published, model = build(7), build(3)
    drawn = copy.deepcopy(model.state_dict())
    told = load_weights(model, file_of(published, tmp_path), new_head=True)
    assert told is not None
    assert told.endswith(
        f"weights.pth: head {head} reinitialised: 7 classes in the file, 3 in the network"
    )
    theirs = published.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, (drawn if name.startswith(f"{head}.") else theirs)[name]), name


def test_a_head_of_the_same_classes_is_taken_over(tmp_path: Path) -> None:
    published, model = (models.build("cifar_resnet8_w4", 3) for _ in range(2))
    told = load_weights(model, file_of(published, tmp_path), new_head=True)
    assert told is not None
    assert told.endswith("head head taken over")
    assert torch.equal(model.head.weight, published.head.weight)


def test_key_prefix_and_head_are_named_together(tmp_path: Path) -> None:
    file = file_of(models.build("cifar_resnet8_w4", 7), tmp_path, "module.", "model_ema")
    told = load_weights(models.build("cifar_resnet8_w4", 3), file, new_head=True)
    assert told is not None
    assert "taken from 'model_ema', names without 'module.', head head reinitialised" in told


@pytest.mark.parametrize(
    ("published", "model", "message"),
    [
        (Own(7, 5), Own(3, 4), "do not fit: stem.weight is (5, 3, 3, 3), the model wants (4"),
        (Own(3, 5), Own(3, 4), "do not fit: stem.weight is (5, 3, 3, 3), the model wants (4"),
        (nn.Sequential(nn.Linear(4, 3)), Own(3), "lack stem.weight, which the model has"),
    ],
    ids=["another width and head", "another width", "no trunk"],
)
def test_every_other_difference_is_an_error_and_changes_nothing(
    published: nn.Module, model: nn.Module, message: str, tmp_path: Path
) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError) as error:
        load_weights(model, file_of(published, tmp_path), new_head=True)
    assert message in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_layer_of_a_librarys_network_is_not_taken_for_its_head(tmp_path: Path) -> None:
    published, model = (models.build("cifar_resnet8_w4", 3) for _ in range(2))
    state = published.state_dict()
    state["conv.weight"] = torch.zeros(9, *state["conv.weight"].shape[1:])
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"do not fit: conv\.weight is \(9, "):
        load_weights(model, tmp_path / "weights.pth", new_head=True)


def test_without_being_asked_for_no_head_is_drawn_anew(tmp_path: Path) -> None:
    file = file_of(models.build("cifar_resnet8_w4", 7), tmp_path)
    with pytest.raises(UserError, match="a head of 7 outputs for 3"):
        load_weights(models.build("cifar_resnet8_w4", 3), file)
