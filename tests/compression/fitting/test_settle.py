"""What follows the fit of all layers."""

import copy

import pytest
import torch
from small_networks import pictures, small

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting import refit
from sbf_dist.compression.fitting.fidelity import Wanted
from sbf_dist.compression.fitting.prior import prior_variances
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.resuming import Route
from sbf_dist.compression.fitting.sequential import SequentialFit
from sbf_dist.compression.fitting.settle import settle
from sbf_dist.compression.holding_out import split
from sbf_dist.compression.outputs import LOGITS

LAYERS = ["conv1", "conv2", "head"]


def spoiled(model, noise):
    """A copy whose second convolution differs, or whose statistics and head are useless."""
    student = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    for name in ("conv1.weight", "norm2.running_mean"):
        tensor = student.state_dict()[name]
        tensor += noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
    return student


def gone_on(student, model, images, held):
    """A fit whose passes have come to the second convolution."""
    route = Route.of(student, model, pictures(3), LAYERS, 2**20)
    fit = SequentialFit(student, Reference(model), {}, images, refit=True, held=held, route=route)
    for side in fit.sides:
        for passes in (side.student, side.reference):
            list(passes.inputs("conv2", 10))
    return fit


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("count", [16, 60])
@pytest.mark.parametrize("compared", [128, 16])
@torch.no_grad()
def test_what_is_reached_is_what_the_student_then_is(noise, count, compared, monkeypatch):
    monkeypatch.setattr("sbf_dist.compression.calibration.PIXELS", 6 * 100)
    monkeypatch.setattr("sbf_dist.compression.fitting.norms.MOST_IMAGES", compared)
    model = small()
    images, held = split(Calibration.of(pictures(count)))
    found = {}
    for way in ("whole", "going on"):
        student = spoiled(model, noise)
        before = Wanted.of(model, held).compare(map(student, held.parts(held.part)))
        fit = None if way == "whole" else gone_on(student, model, images, held)
        judge = settle(
            student, Reference(model), images, held, refit=True, yardstick=LOGITS, fit=fit
        )
        after = Wanted.of(model, held).compare(map(student, held.parts(held.part)))
        assert judge.fidelity.kl == pytest.approx(after.kl, rel=1e-4, abs=1e-7)
        assert after.kl <= before.kl + 1e-7
        found[way] = student, judge.steps
    assert found["whole"][1] == found["going on"][1]
    one, other = (student.state_dict() for student, _ in found.values())
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@torch.no_grad()
def test_priors_that_are_given_are_not_measured_again(monkeypatch):
    model = small()
    images, held = split(Calibration.of(pictures(60)))
    students, measured = [spoiled(model, 0.1), spoiled(model, 0.1)], []

    def measure(*given):
        # On the student as it then is.
        measured.append(prior_variances(*given))
        return measured[-1]

    monkeypatch.setattr(refit, "prior_variances", measure)
    for student in students:
        priors = measured[0] if measured else None
        given = {"refit": True, "yardstick": LOGITS, "priors": priors}
        judge = settle(student, Reference(model), images, held, **given)
        assert not torch.equal(student.head.weight, model.head.weight), judge.steps
    assert len(measured) == 1 and list(measured[0]) == ["head"]
    one, other = (student.state_dict() for student in students)
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@torch.no_grad()
def test_without_images_held_out_nothing_is_changed():
    model = small()
    student = spoiled(model, 0.5)
    before = copy.deepcopy(student.state_dict())
    images = Calibration.of(pictures(6))
    assert settle(student, Reference(model), images, None, refit=True, yardstick=LOGITS) is None
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())


@torch.no_grad()
def test_a_network_that_is_exact_keeps_its_weights():
    model = small()
    student = copy.deepcopy(model)
    images, held = split(Calibration.of(pictures(60)))
    settle(student, Reference(model), images, held, refit=True, yardstick=LOGITS)
    for key, value in model.state_dict().items():
        assert torch.equal(student.state_dict()[key], value), key
