"""The stage teachers: what it refuses before a training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from launchers.run import work
from launchers.run.folder import RunFolder
from launchers.run.networks import Networks
from sbf_dist.errors import UserError
from sbf_dist.recipe import validate

CODE = """
from torch import nn

def thousand():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))

def several():
    class Several(nn.Module):
        def forward(self, x):
            return [x, x]
    return Several()

def grey(num_classes):
    return nn.Sequential(nn.Conv2d(1, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def right(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))
"""


def check(folder: Path, function: str) -> None:
    (folder / "mine.py").write_text(CODE)
    model = {"model": f"{folder / 'mine.py'}:{function}", "training": {"steps": 9}}
    content = {
        "name": "tiny",
        "data": {"source": "digits", "image_size": 16},
        "teachers": [{"name": "one"} | model],
        "compress": {"teacher": "one", "macs": 0.5},
        "distill": {"training": {"steps": 9}},
    }
    networks = Networks.of(validate(content, (), "recipe"), RunFolder(folder, "tiny"))
    session = SimpleNamespace(num_classes=10, networks=networks)
    work._check_teacher(cast("Any", session), networks.teachers[0])


@pytest.mark.parametrize(("function", "given"), [("thousand", "1000 outputs"), ("several", "list")])
def test_a_model_with_other_outputs_than_classes_is_refused_before_its_training(
    tmp_path: Path, function: str, given: str
) -> None:
    with pytest.raises(UserError) as refused:
        check(tmp_path, function)
    assert str(refused.value) == (
        f"teacher one: its model gives {given} for an image; must be 10 outputs, the classes of "
        "the images"
    )
    check(tmp_path, "right")


def test_a_model_that_reads_other_channels_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot take images of 3 x 16 x 16: RuntimeError: ") as one:
        check(tmp_path, "grey")
    assert "\n" not in str(one.value)
