"""Every classifier of benchmarks/models.py, cheaply; and what is evaluated is what is exported.

Networks with other outputs are those of test_all_kinds.
"""

import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

# As for a script, its folder is where it finds its own modules.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from models import NETWORKS, SEGMENTATION, pictures, settle

from sbf_dist.compression.candidates import find_candidates
from sbf_dist.compression.convert import convert
from sbf_dist.compression.cost import count
from sbf_dist.compression.one_shot import compress
from sbf_dist.compression.plan import DenseLayer, Layer, Plan, SBFLayer
from sbf_dist.export.onnx import export_onnx, verify_onnx
from sbf_dist.export.optimize import optimize
from sbf_dist.export.saved import Card, load_student, save_student
from sbf_dist.layers import SBFConv2d
from sbf_dist.models import build
from sbf_dist.settings import Compression
from sbf_dist.weights import load_state

CLASSES = 5
CLASSIFIERS = [
    name for name, network in NETWORKS.items() if not network.model and network is not SEGMENTATION
]
# Where it is not 32: what the networks want, and one whose batch norms want more positions.
SIDES = {
    "torchvision:alexnet": 64,
    "torchvision:efficientnet_v2_s": 64,
    "torchvision:inception_v3": 75,
    "torchvision:maxvit_t": 224,
}


def half_plan(name, model, images):
    """Keep half of the filters of every candidate, at random, with random sources."""
    reasons, candidates = find_candidates(model, images, 3)
    draw = random.Random(0)
    layers: dict[str, Layer] = {
        layer: DenseLayer(reason=reason, macs=0, convertible=False)
        for layer, reason in reasons.items()
    }
    for layer in candidates:
        channels, groups = (
            getattr(model.get_submodule(layer), key) for key in ("out_channels", "groups")
        )
        size = channels // groups  # of a group, each of which keeps as many
        kept = sorted(
            channel
            for start in range(0, channels, size)
            for channel in draw.sample(range(start, start + size), size // 2)
        )
        layers[layer] = SBFLayer(
            channels=channels,
            kept=kept,
            sources=[draw.choices(kept, k=2) for _ in range(channels - len(kept))],
            transform_size=3,
            macs_before=0,
            macs_after=0,
            error=0.0,
            reason="by rule",
        )
    assert candidates
    return Plan(
        model=name,
        classes=CLASSES,
        input_shape=tuple(images.shape[1:]),
        budget={"macs": 0.5},
        macs_before=0,
        macs_after=0,
        params_before=0,
        params_after=0,
        layers=layers,
    )


def randomised(student, images):
    """Give the transformations values that matter, and let batch norms know what comes of them."""
    for module in student.modules():
        if isinstance(module, SBFConv2d):
            nn.init.normal_(module.transforms, std=0.3)
    return settle(student, images)


def made_again(plan, student):
    """Make a network of nothing but the plan's text and the student's numbers."""
    dense = build(plan.model, CLASSES)
    again = convert(dense, Plan.model_validate_json(plan.model_dump_json()))
    load_state(again, dict(student.state_dict()))
    return again.eval()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_network_is_converted_trained_loaded_and_optimized(name):
    torch.manual_seed(0)
    images = pictures(2, SIDES.get(name, 32))
    model = build(name, CLASSES)
    plan = half_plan(name, model.eval(), images)
    turned = [images, images.flip(2), images.flip(3), images.flip(2, 3)]
    student = randomised(convert(model, plan), torch.cat(turned))

    shape = plan.input_shape
    assert count(student, shape).macs < count(model, shape).macs
    with torch.inference_mode():
        expected = student(images)
    assert expected.shape == (2, CLASSES)
    assert expected.isfinite().all()

    del model  # some are large
    with torch.inference_mode():
        assert torch.equal(made_again(plan, student)(images), expected)
        found = optimize(student)(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))

    F.cross_entropy(student.train()(images), torch.tensor([0, 1])).backward()
    for parameter_name, parameter in student.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", ["cifar_vgg11_w8", "timm:test_efficientnet", "timm:test_resnet"])
def test_what_is_evaluated_is_what_is_planned_saved_optimized_and_exported(name, tmp_path: Path):
    torch.manual_seed(0)
    images = pictures(16, 32)
    model = settle(build(name, CLASSES), images)
    student, plan = compress(model, images, Compression(macs=0.7, sources=2))
    assert plan.model == name, "found out"
    # It costs what the plan says, and that is within the budget: nothing is merely masked.
    assert count(student, plan.input_shape).macs == plan.macs_after
    assert plan.macs_after <= 0.7 * count(model, plan.input_shape).macs
    sbf = {n for n, module in student.named_modules() if isinstance(module, SBFConv2d)}
    assert sbf == {n for n, layer in plan.layers.items() if isinstance(layer, SBFLayer)}
    assert sbf

    with torch.inference_mode():
        expected = student(images)
    card = Card.of(plan, classes=list("abcde"), mean=[0.0] * 3, std=[1.0] * 3)
    save_student(tmp_path / "student", student, plan, card)
    loaded = load_student(tmp_path / "student")
    with torch.inference_mode():
        assert torch.equal(loaded(images), expected)
        found = optimize(loaded)(images.contiguous(memory_format=torch.channels_last))
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * largest)
    export_onnx(loaded, tmp_path / "student.onnx", card)
    assert verify_onnx(tmp_path / "student.onnx", student, images) < 1e-4 * largest
