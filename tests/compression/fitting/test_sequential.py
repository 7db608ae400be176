"""Layers fitted in order on what the student gives them."""

import copy

import pytest
import torch
from small_networks import pictures, small
from torch import nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting import layerwise, sequential
from sbf_dist.compression.fitting.mixture import best_space
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.sequential import SequentialFit
from sbf_dist.compression.fitting.statistics import gather_moments, run_until
from sbf_dist.compression.fitting.transforms import rank_channels

IMAGES = pictures(40)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def rank(moments):
    return rank_channels(moments, torch.ones(len(moments.yy), dtype=torch.double))


def fitted(model, *, refit, reference=None, sizes=None, kept=8):
    student = copy.deepcopy(model)
    sizes = sizes or {"conv1": 3, "conv2": 3}
    fit = SequentialFit(
        student, reference or Reference(model), sizes, Calibration.of(IMAGES), refit=refit
    )
    plans = {name: fit.convert(name, rank, kept, 2, 1000) for name in sizes}
    return student, plans


def error(model, student, name, channels=slice(None)):
    wanted = run_until(model, name, IMAGES, output=True)[:, channels]
    made = run_until(student, name, IMAGES, output=True)
    variance = wanted.transpose(0, 1).flatten(1).var(1, correction=0).sum()
    return float((wanted - made).square().mean((0, 2, 3)).sum() / variance)


def test_errors_are_what_the_student_is_measured_to_have():
    model = small(norm=False)
    student, plans = fitted(model, refit=True)
    for name, plan in plans.items():
        assert plan.error == pytest.approx(error(model, student, name), rel=1e-3)


def test_filters_that_are_solved_anew_leave_a_smaller_error():
    model = small(norm=False)
    plain, _ = fitted(model, refit=False)
    mended, _ = fitted(model, refit=True)
    # The first converted layer gets what the dense one gets: nothing to mend.
    assert error(model, mended, "conv1") == pytest.approx(error(model, plain, "conv1"), rel=0.05)
    assert error(model, mended, "conv2") < 0.95 * error(model, plain, "conv2")


def test_a_layer_that_stays_dense_mends_what_came_before():
    model = small()
    student = copy.deepcopy(model)
    sizes = {"conv1": 3, "conv2": 1}
    fit = SequentialFit(student, Reference(model), sizes, Calibration.of(IMAGES), refit=True)
    fit.convert("conv1", rank, 4, 1, 1000)
    before = error(model, student, "norm2")  # which takes up the means
    fit.mend("conv2")
    assert error(model, student, "norm2") < 0.9 * before
    assert student.conv2.bias is None
    assert type(student.conv2) is nn.Conv2d


@pytest.mark.parametrize("converted", [True, False])
def test_what_an_earlier_fit_left_in_a_batch_norm_does_not_count_twice(converted):
    model = small()
    students = []
    for shift in (0.0, 3.0):
        student = copy.deepcopy(model)
        student.norm2.running_mean += shift
        student.norm2.running_var *= 1 + shift
        sizes = {"conv2": 1}
        fit = SequentialFit(student, Reference(model), sizes, Calibration.of(IMAGES), refit=True)
        if converted:
            fit.convert("conv2", rank, 8, 2, 1000)
        else:
            fit.mend("conv2")
        students.append(student)
    torch.testing.assert_close(students[1](IMAGES), students[0](IMAGES))


def narrowed(model, left):
    """Cut channels off conv1, and what reads them."""
    narrow = copy.deepcopy(model)
    narrow.conv1 = nn.Conv2d(8, len(left), 3, padding=1)
    narrow.conv1.weight.copy_(model.conv1.weight[left])
    narrow.conv1.bias.copy_(model.conv1.bias[left])
    narrow.conv2 = nn.Conv2d(len(left), 16, 3, stride=2, padding=1)
    narrow.conv2.weight.copy_(model.conv2.weight[:, left])
    narrow.conv2.bias.copy_(model.conv2.bias)
    return narrow


def test_a_narrowed_network_is_fitted_to_the_outputs_of_the_one_it_was():
    model = small(norm=False)
    left = [0, 2, 3, 5, 7, 8, 9, 10, 11, 12, 13, 15]
    narrow = narrowed(model, left)
    reference = Reference(model, {"conv1": left})
    to_dense, _ = fitted(narrow, refit=True, reference=reference)
    to_itself, _ = fitted(narrow, refit=True)
    assert to_dense.conv1.out_channels == 12
    assert error(model, to_dense, "conv2") < 0.95 * error(model, to_itself, "conv2")
    # conv1's own channels have lost nothing by the narrowing.
    assert error(model, to_dense, "conv1", left) == pytest.approx(
        error(narrow, to_itself, "conv1"), rel=1e-3
    )


def test_inputs_that_do_not_fit_are_computed_again_with_the_same_result(monkeypatch):
    held, _ = fitted(small(), refit=True)
    monkeypatch.setattr(sequential, "INPUTS", 0)
    monkeypatch.setattr(layerwise, "TARGETS", 0)
    again, _ = fitted(small(), refit=True)
    for key, value in held.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value)


def test_only_the_positions_that_are_drawn_are_looked_at(monkeypatch):
    for name, value in {"LEAST": 800, "MOST": 800, "PER_IMAGE": 40}.items():
        monkeypatch.setattr(layerwise, name, value)
    model = small(norm=False)
    student, plans = fitted(model, refit=True)
    for name, plan in plans.items():
        assert plan.error == pytest.approx(error(model, student, name), rel=0.2)


def test_filters_with_more_weights_than_samples_stay_as_they_are():
    model = small()
    student = copy.deepcopy(model)
    few = Calibration.of(IMAGES[:4])  # 100 positions of conv2, whose filters have 144 weights
    fit = SequentialFit(student, Reference(model), {"conv2": 1}, few, refit=True)
    fit.mend("conv2")
    assert torch.equal(student.conv2.weight, model.conv2.weight)


@pytest.mark.parametrize("norm", [True, False])
def test_what_filters_that_are_solved_anew_give_needs_no_pass_of_its_own(norm, monkeypatch):
    model = small(norm=norm)
    student = copy.deepcopy(model)
    parts = IMAGES.split([30, 10])
    images, held = map(Calibration.of, parts)
    sizes = {"conv1": 3, "conv2": 1}
    fit = SequentialFit(student, Reference(model), sizes, images, refit=True, held=held)
    passes, compared = [], []
    gather = fit._candidates
    monkeypatch.setattr(
        fit, "_candidates", lambda name, of: passes.append(name) or gather(name, of)
    )

    def compare(moments, apart, weights, kept):
        assert not torch.equal(student.conv2.weight, model.conv2.weight)
        for part, found in zip(parts, (moments, apart), strict=True):
            inputs = run_until(student, "conv2", part, output=False)
            candidates = student.conv2._conv_forward(inputs, student.conv2.weight, None)
            wanted = gather_moments([(candidates, run_until(model, "conv2", part, output=True))], 1)
            for field in ("zz", "zy", "yy", "z_mean", "y_mean", "drift"):
                value = getattr(wanted, field)
                least = 1e-4 * float(value.abs().max())
                torch.testing.assert_close(getattr(found, field), value, rtol=1e-4, atol=least)
        compared.append(kept)
        return best_space(moments, apart, weights, kept)

    monkeypatch.setattr(sequential, "best_space", compare)
    fit.convert("conv1", rank, 4, 1, 1000)
    plan = fit.convert_whole_basis("conv2", 8, torch.ones(16, dtype=torch.double), None, 1000)
    assert compared == [8] and passes == ["conv1"]
    assert plan.error == pytest.approx(error(model, student, "conv2"), rel=0.2)


def test_filters_that_are_not_solved_are_seen_in_a_pass(monkeypatch):
    model = small()
    fit = SequentialFit(
        copy.deepcopy(model), Reference(model), {"conv2": 1}, Calibration.of(IMAGES), refit=False
    )
    monkeypatch.setattr(sequential, "output_moments", None)
    assert fit.convert("conv2", rank, 8, 2, 1000).kept
