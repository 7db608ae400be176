"""Students with batch norm and ReLU between basis and transformations, in every form."""

import logging
from pathlib import Path

import pytest
import torch
from students import half_of_every_block, make_student

from sbf_dist.compression.plan import Plan, SBFLayer
from sbf_dist.export.fold import fold_batchnorm
from sbf_dist.export.onnx import export_onnx, verify_onnx
from sbf_dist.export.optimize import optimize
from sbf_dist.export.saved import Card, load_student, save_student
from sbf_dist.export.standard_operators import with_standard_operators
from sbf_dist.layers import SBFConv2d

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def plan_with(sources: int) -> Plan:
    plan = half_of_every_block(sources)
    for name, layer in plan.layers.items():
        # Every other layer, so that both kinds follow each other.
        if isinstance(layer, SBFLayer) and name.endswith("conv1"):
            plan.layers[name] = layer.model_copy(update={"between": "bn_relu"})
    return plan


@pytest.mark.parametrize("sources", [1, 2])
def test_folded_optimized_and_portable_networks_give_the_same(
    sources: int, caplog: pytest.LogCaptureFixture
) -> None:
    student = make_student(plan_with(sources))
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        wanted = student(IMAGES)
        for network in (
            fold_batchnorm(student),
            optimize(student),
            with_standard_operators(fold_batchnorm(student)),
        ):
            torch.testing.assert_close(network(IMAGES), wanted, rtol=1e-4, atol=1e-4)
    kept = fold_batchnorm(student).get_submodule("stages.0.0.conv1")
    assert isinstance(kept, SBFConv2d)
    assert kept.between is not None
    assert "norm1" in caplog.text, "what is not folded is logged"
    assert "between" not in caplog.text, "what is between is no candidate for folding"


def test_a_saved_student_comes_back_with_what_stands_between(tmp_path: Path) -> None:
    plan = plan_with(2)
    student = make_student(plan)
    card = Card.of(plan, classes=list("0123456789"), mean=[0.5] * 3, std=[0.2] * 3)
    save_student(tmp_path / "student", student, plan, card)
    loaded = load_student(tmp_path / "student")
    assert torch.equal(loaded(IMAGES), student(IMAGES))
    norm = loaded.get_submodule("stages.0.0.conv1.between.0")
    assert torch.equal(
        norm.running_var, student.get_submodule("stages.0.0.conv1.between.0").running_var
    )


def test_an_onnx_file_agrees(tmp_path: Path) -> None:
    plan = plan_with(2)
    student = make_student(plan)
    card = Card.of(plan, classes=list("0123456789"), mean=[0.5] * 3, std=[0.2] * 3)
    export_onnx(student, tmp_path / "student.onnx", card)
    assert verify_onnx(tmp_path / "student.onnx", student, IMAGES) <= 1e-4
