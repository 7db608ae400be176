"""Nothing changes until something is changed, and no step makes a network worse."""

import copy
import re

import pytest
import torch
from rebuilt_networks import shrink
from small_networks import pictures, small
from torch import nn

from sbf_dist.compression.fitting.statistics import measure_batch_norm
from sbf_dist.compression.plan import DenseLayer


def test_the_whole_budget_converts_nothing():
    model = small()
    student, plan = shrink(model, macs=1.0)
    assert {layer.kind for layer in plan.layers.values()} == {"dense"}
    assert isinstance(plan.layers["conv1"], DenseLayer)
    assert plan.layers["conv1"].convertible
    assert plan.macs_after == plan.macs_before
    assert student.state_dict().keys() == model.state_dict().keys()


def foreign(norm=True):
    """A network whose batch norms have statistics that the images do not have."""
    model = small(norm=norm)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 0.3
            module.running_var *= 3
    return model


@pytest.mark.parametrize("settings", [{}, {"keep": ["*"]}])
def test_a_network_that_fits_its_budget_computes_what_it_did(settings):
    model, images = foreign(), 0.2 * pictures(40) + 1
    student, plan = shrink(model, images, macs=1.0, **settings)
    assert {layer.kind for layer in plan.layers.values()} == {"dense"}
    for key, value in model.state_dict().items():
        assert torch.equal(student.state_dict()[key], value), key


def test_statistics_that_the_images_do_not_have_stay():
    model, images = foreign(), pictures(200)
    student, plan = shrink(model, images, macs=0.6)
    assert plan.fidelity is not None
    assert plan.fidelity.kl < 0.3
    assert plan.fidelity.agreement > 0.6
    unseen = 0.5 + pictures(500)[300:]
    with torch.no_grad():
        before, after = model(unseen).log_softmax(1), student(unseen).log_softmax(1)
        replaced = copy.deepcopy(student)
        measure_batch_norm(replaced, images, 64)
        anew = replaced(unseen).log_softmax(1)
    assert kl(before, after) < 0.5 * kl(before, anew)


def kl(wanted, found):
    return float((wanted.exp() * (wanted - found)).sum(1).mean())


def test_each_step_is_kept_only_if_images_held_out_are_nearer():
    _, plan = shrink(foreign(), pictures(80), macs=0.5)
    steps = [line for line in plan.explanation if "KL" in line]
    assert len(steps) == 3
    values = [float(re.search(r"KL (\d[\d.e-]*\d|\d)", step)[1]) for step in steps]
    kept = [v for v, step in zip(values, steps, strict=True) if "not kept" not in step]
    assert kept == sorted(kept, reverse=True)
    assert plan.fidelity.kl == pytest.approx(kept[-1], rel=0.01)
