"""Students of which channels were removed are saved, loaded, folded and exported like others."""

import pytest
import torch
from torch import nn

from sbf_dist import models
from sbf_dist.compression.joint import plan_jointly
from sbf_dist.export.onnx import export_onnx, verify_onnx
from sbf_dist.export.optimize import optimize
from sbf_dist.export.saved import Card, load_student, save_student
from sbf_dist.settings import Compression


@pytest.fixture(scope="module")
def narrowed():
    torch.manual_seed(0)
    model = models.build("cifar_resnet8", 10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.5)
    images = torch.randn(48, 3, 16, 16)
    student, plan = plan_jointly(model, images, Compression(macs=0.4, removal=0.5))
    assert plan.removed
    assert any(layer.kind == "sbf" for layer in plan.layers.values())
    return student, plan


def card_of(plan):
    return Card.of(plan, classes=[str(i) for i in range(10)], mean=[0.5] * 3, std=[0.2] * 3)


def test_a_narrowed_student_is_saved_and_loaded_without_its_dense_network(narrowed, tmp_path):
    student, plan = narrowed
    save_student(tmp_path / "student", student, plan, card_of(plan))
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_student(tmp_path / "student")(x), student(x))


def test_a_narrowed_student_is_optimized(narrowed):
    student, _ = narrowed
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(optimize(student)(x), student(x), rtol=1e-3, atol=1e-3)


def test_a_narrowed_student_is_exported_to_onnx(narrowed, tmp_path):
    student, plan = narrowed
    export_onnx(student, tmp_path / "student.onnx", card_of(plan))
    assert verify_onnx(tmp_path / "student.onnx", student, torch.randn(3, 3, 16, 16)) < 1e-3
