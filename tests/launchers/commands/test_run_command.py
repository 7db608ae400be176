"""`sbf run`: what it refuses about networks before anything is begun."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from launchers.run import execution

RECIPE = """
name: tiny
data: {source: folder, root: photos, validation: 2, image_size: 16}
teachers: [{name: one, model: cifar_resnet8_w4, training: {steps: 10}}]
compress: {teacher: one, macs: 0.5}
distill: {training: {steps: 10}, features: {}}
baselines: {steps: 10}
"""
Sbf = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sbf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sbf: Sbf) -> Sbf:
    """The command line in a folder with two classes of images. No run is begun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(execution, "execute", lambda *_: None)
    Path("tiny.yaml").write_text(RECIPE)
    for name in ("cat", "dog"):
        Path("photos", name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (20, 20)).save(f"photos/{name}/{number}.png")
    return sbf


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.training.freeze=['*']", "distill.training.freeze: ['*'] matches all parameters"),
        ("distill.training.freeze=[nope]", "distill.training.freeze: no parameter matches 'nope'"),
        ("baselines.freeze=['*']", "baselines.freeze: ['*'] matches all parameters"),
        ("baselines.freeze=[nope]", "baselines.freeze: no parameter matches 'nope'"),
        ("distill.features.layers=[nope]", "distill.features.layers: 'nope' must be a module of"),
        (
            "teachers.0.model=timm:resnet50.a1_in1",
            "teachers.0: model 'timm:resnet50.a1_in1' is unknown: resnet50 has the weights a1_in1k",
        ),
        (
            "teachers.0={name: one, model: 'timm:resnet18', training: {steps: 9}, arguments: "
            "{features_only: true, out_indices: [9]}}",
            "teachers.0: model 'timm:resnet18' cannot be built with {'features_only': True, "
            "'out_indices': [9]}: list index out of range",
        ),
        (
            "teachers.0.arguments={num_classes: abc}",
            "teachers.0: model 'cifar_resnet8_w4': num_classes = 'abc' must be a number of classes",
        ),
        (
            "teachers.0.arguments={num_classes: 7}",
            "teachers.0.arguments.num_classes = 7 must be 2, the number of classes of the images",
        ),
    ],
)
def test_what_a_network_does_not_have_is_refused_before_one_is_trained(
    sbf: Sbf, override: str, message: str
) -> None:
    code, out, err = sbf("run", "tiny.yaml", override)
    assert (code, out) == (2, "")
    assert err.startswith(f"sbf: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "override",
    [
        "distill.training.freeze=['stages.0*', 'norm.*']",
        "distill.training.freeze=['*.transforms']",  # of SBF layers
        "teachers.0.arguments={}",
    ],
)
def test_patterns_of_the_dense_network_and_of_its_student_are_right(
    sbf: Sbf, override: str
) -> None:
    assert sbf("run", "tiny.yaml", override) == (0, "", "")
