"""Filters solved anew, against NumPy's least squares on rows that are laid out explicitly."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import pictures, small
from torch import nn
from torch.nn.utils import parametrizations, prune

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting import refit
from sbf_dist.compression.fitting.layerwise import Draw
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.refit import (
    RIDGES,
    NormalEquations,
    _errors,
    _joined,
    best_solution,
    drawn_patches,
    filter_moments,
    is_mended,
    linear_heads,
    obstacle,
    output_moments,
    refit_heads,
    solve,
)
from sbf_dist.compression.fitting.statistics import MomentSums, gather_moments
from sbf_dist.compression.one_shot import compress
from sbf_dist.settings import Compression

EVERYTHING = Draw("conv", images=10**6, per_image=10**6)


def batches(inputs, targets, size):
    """Batches of inputs with the rows of targets (N, C, H, W), as `filter_moments` takes them."""
    return [
        (start, inputs[start : start + size], rows.transpose(0, 1).flatten(1).T)
        for start, rows in zip(range(0, len(inputs), size), targets.split(size), strict=True)
    ]


def solve_anew(conv, inputs, targets, size, *, centred=True):
    """Solve the filters of `conv`, in place."""
    moments = filter_moments(conv, batches(inputs, targets, size), EVERYTHING)
    weight, bias = solve(moments, conv.weight, centred=centred)
    with torch.no_grad():
        conv.weight.copy_(weight)
        if conv.bias is not None:
            conv.bias.copy_(bias)


@pytest.mark.parametrize(
    "shape",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (1, 3), "stride": 2, "padding": (0, 2), "dilation": (1, 2)},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_patches_times_filters_are_the_convolution(shape):
    conv = nn.Conv2d(3, 4, bias=False, **shape)
    images = pictures(5, 9)
    with torch.no_grad():
        outputs = conv(images)
        rows = drawn_patches(conv, images, EVERYTHING, 0)
        made = rows @ conv.weight.flatten(1).T
        torch.testing.assert_close(made, outputs.transpose(0, 1).flatten(1).T)
        draw = Draw("conv", images=4, per_image=3)
        some = drawn_patches(conv, images, draw, 0) @ conv.weight.flatten(1).T
        torch.testing.assert_close(some, draw.rows(outputs, 1, 0))


@torch.no_grad()
@pytest.mark.parametrize("draw", [EVERYTHING, Draw("conv", images=9, per_image=7)], ids=str)
def test_what_filters_give_follows_from_what_they_see(draw):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    images = pictures(12, 11) + 0.5
    targets = conv(images) + 0.1 * torch.randn(12, 4, 6, 6)
    given = [
        (start, images[start : start + 5], draw.rows(targets[start : start + 5], 1, start))
        for start in (0, 5, 10)
    ]
    sums = MomentSums(1)
    for start, inputs, rows in given:
        candidates = conv._conv_forward(inputs, conv.weight, None)
        sums.add(draw.rows(candidates, 1, start), rows)
    passed = sums.moments()
    found = output_moments(filter_moments(conv, given, draw), conv.weight)
    for field in ("zz", "zy", "yy", "z_mean", "y_mean", "drift"):
        wanted = getattr(passed, field)
        assert getattr(found, field).shape == wanted.shape
        largest = float(wanted.abs().max())
        torch.testing.assert_close(getattr(found, field), wanted, rtol=1e-4, atol=1e-4 * largest)
    torch.testing.assert_close(found.drift, passed.drift, rtol=1e-4, atol=0)


def rows_of(inputs):
    columns = F.unfold(inputs, 3, padding=1)
    return columns.transpose(1, 2).flatten(0, 1).double().numpy()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("size", [12, 5])
def test_filters_are_numpys_least_squares_solution_near_the_old_ones(centred, size):
    torch.manual_seed(0)
    conv, wanted = nn.Conv2d(3, 4, 3, padding=1, bias=centred), nn.Conv2d(3, 4, 3, padding=1)
    inputs = pictures(12) + 0.5
    with torch.no_grad():
        targets = wanted(inputs + 0.3 * torch.randn_like(inputs))
    old = conv.weight.detach().flatten(1).double().numpy()
    solve_anew(conv, inputs, targets, size, centred=centred)

    x, y = rows_of(inputs), targets.transpose(0, 1).flatten(1).T.double().numpy()
    mean, y_mean = (x.mean(0), y.mean(0)) if centred else (np.zeros(27), np.zeros(4))
    x, y = x - mean, y - y_mean
    variance = (x**2).mean(0).reshape(3, 9).mean(1).repeat(9)  # of each input channel
    ridge = np.diag(np.sqrt(len(x) * refit.RIDGE * variance))
    expected, *_ = np.linalg.lstsq(
        np.concatenate([x, ridge]), np.concatenate([y, ridge @ old.T]), rcond=None
    )
    np.testing.assert_allclose(conv.weight.detach().flatten(1), expected.T, rtol=1e-3, atol=1e-5)
    if centred:
        bias = y_mean - mean @ expected
        np.testing.assert_allclose(conv.bias.detach(), bias, rtol=1e-3, atol=1e-4)
    else:
        assert conv.bias is None


def test_filters_that_are_right_already_stay():
    torch.manual_seed(0)
    conv, inputs = nn.Conv2d(3, 4, 3, padding=1), pictures(12)
    weight, bias = conv.weight.detach().clone(), conv.bias.detach().clone()
    with torch.no_grad():
        targets = conv(inputs)
    solve_anew(conv, inputs, targets, 4)
    torch.testing.assert_close(conv.weight, weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(conv.bias, bias, rtol=1e-3, atol=1e-5)


def test_inputs_that_are_dead_leave_their_filters_as_they_were():
    torch.manual_seed(0)
    conv, inputs = nn.Conv2d(3, 2, 3, padding=1), pictures(12)
    inputs[:, 1] = 0
    before = conv.weight.detach().clone()
    targets = torch.randn(12, 2, 10, 10)
    solve_anew(conv, inputs, targets, 12)
    torch.testing.assert_close(conv.weight[:, 1], before[:, 1])
    assert not torch.equal(conv.weight[:, 0], before[:, 0])
    assert conv.weight.isfinite().all()


def test_what_is_too_wide_or_grouped_says_why():
    assert obstacle(nn.Conv2d(64, 8, 3)) is None
    assert obstacle(nn.Conv2d(8, 8, 3, groups=8)) == "grouped convolution (8 groups)"
    told = obstacle(nn.Conv2d(513, 8, 3))
    assert told == "a filter has 4617 weights, more than 4608"


def test_the_stem_reads_the_images_themselves_and_is_not_mended():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=2))
    mended = [is_mended(model, name, pictures(1)) for name in ("0", "1", "2")]
    assert mended == [False, True, False]


def moments_of(inputs, targets):
    return filter_moments(nn.Conv2d(6, 4, 1), batches(inputs, targets, 10), EVERYTHING)


def test_filters_stay_where_images_held_out_gain_nothing_by_new_ones():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, 1)
    inputs, others = torch.randn(10, 6, 2, 2), torch.randn(200, 6, 2, 2)
    with torch.no_grad():
        # What the layer lacks has nothing to do with its inputs: it can only be learnt by heart.
        noisy = conv(inputs) + torch.randn(10, 4, 2, 2)
        held = moments_of(others, conv(others) + torch.randn(200, 4, 2, 2))
    weight, _ = best_solution(moments_of(inputs, noisy), held, conv.weight)
    assert torch.equal(weight, conv.weight.double())


def test_filters_are_solved_where_images_held_out_gain_by_it():
    torch.manual_seed(0)
    conv, wanted = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)
    inputs, others = torch.randn(100, 6, 2, 2), torch.randn(100, 6, 2, 2)
    with torch.no_grad():
        fit, held = moments_of(inputs, wanted(inputs)), moments_of(others, wanted(others))
    found = best_solution(fit, held, conv.weight)
    torch.testing.assert_close(found, solve(fit, conv.weight, ridge=RIDGES[0]))


def solved_directly(moments, weight, ridge, *, centred, prior):
    """Weight and bias by a general solve of the normal equations, written out."""
    old, taps = weight.flatten(1).double().numpy(), weight[0, 0].numel()
    gram, cross = moments.zz.numpy(), moments.zy.numpy()
    z_mean, y_mean = moments.z_mean.numpy(), moments.y_mean.numpy()
    if not centred:
        gram = gram + np.outer(z_mean, z_mean)
        cross = cross + np.outer(z_mean, y_mean)
    variance = gram.diagonal().reshape(-1, taps).mean(1)
    if prior is not None:
        variance = np.maximum(variance, prior.numpy())
    added = np.diag((ridge * variance + refit.FLOOR * variance.mean()).repeat(taps))
    new = np.linalg.solve(gram + added, cross + added @ old.T).T
    return new, y_mean - new @ z_mean


@torch.no_grad()
@pytest.mark.parametrize("with_prior", [True, False])
@pytest.mark.parametrize("centred", [True, False])
def test_every_ridge_gives_the_solution_of_its_normal_equations(centred, with_prior):
    torch.manual_seed(0)
    conv, wanted = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    inputs = pictures(12) + 0.5
    moments = filter_moments(conv, batches(inputs, wanted(inputs), 5), EVERYTHING)
    prior = torch.tensor([0.1, 9.0, 2.0], dtype=torch.double) if with_prior else None
    given = {"centred": centred, "prior": prior}
    equations = NormalEquations(moments, conv.weight, **given)
    for ridge in RIDGES:
        weight, bias = equations.solution(ridge)
        again = solve(moments, conv.weight, ridge=ridge, **given)
        torch.testing.assert_close((weight, bias), again, rtol=1e-9, atol=1e-12)
        if ridge < np.inf:
            new, shift = solved_directly(moments, conv.weight, ridge, **given)
            np.testing.assert_allclose(weight.flatten(1), new, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(bias, shift, rtol=1e-9, atol=1e-9)
        else:
            assert torch.equal(weight, conv.weight.double())


@torch.no_grad()
@pytest.mark.parametrize("noise", [0.0, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("centred", [True, False])
def test_of_all_ridges_the_one_with_the_least_error_on_images_held_out_is_taken(centred, noise):
    torch.manual_seed(0)
    conv, wanted = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)
    inputs, others = torch.randn(10, 6, 2, 2), torch.randn(100, 6, 2, 2)
    fit = moments_of(inputs, wanted(inputs) + noise * torch.randn(10, 4, 2, 2))
    held = moments_of(others, wanted(others))
    found = best_solution(fit, held, conv.weight, centred=centred)
    scale = held.yy + 0.01 * held.yy.mean()
    solutions = [solve(fit, conv.weight, centred=centred, ridge=ridge) for ridge in RIDGES]
    best = min(reversed(solutions), key=lambda one: float((_errors(one, held) / scale).sum()))
    torch.testing.assert_close(found, best, rtol=1e-9, atol=1e-12)


class Heads(nn.Module):
    """Two linear layers that read vectors, one that reads a sequence, one that is used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3)
        self.sequence = nn.Linear(8, 8)
        self.twice = nn.Linear(12, 12)
        self.hidden = nn.Linear(12, 10)
        self.head = nn.Linear(10, 4, bias=False)

    def forward(self, x):
        x = self.sequence(self.conv(x)).mean((2, 3))
        x = self.twice(self.twice(x)).relu()
        return self.head(self.hidden(x).relu())


def disturbed(model):
    """The same network with another convolution."""
    other = copy.deepcopy(model)
    other.conv.weight.data += 0.05 * torch.randn_like(other.conv.weight)
    return other


def difference(model, other, images):
    with torch.no_grad():
        return float((model(images) - other(images)).square().mean())


@pytest.mark.parametrize("batch", [64, 5])
def test_linear_layers_that_read_vectors_are_solved_anew(batch):
    torch.manual_seed(0)
    model = Heads().eval()
    other = disturbed(model)
    images, unseen = pictures(200).split([150, 50])
    before = difference(model, other, unseen)
    assert refit_heads(other, Reference(model), Calibration.of(images, batch=batch)) == [
        "hidden",
        "head",
    ]
    assert difference(model, other, unseen) < 0.5 * before
    for name in ("sequence", "twice"):
        assert torch.equal(other.get_submodule(name).weight, model.get_submodule(name).weight)


def norm_its_weight(head):
    nn.utils.weight_norm(head)


def mask_its_weight(head):
    prune.l1_unstructured(head, "weight", 0.3)


def parametrise_its_weight(head):
    parametrizations.weight_norm(head)


def double_its_output(head):
    head.register_forward_hook(lambda _, __, output: 2 * output)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "change", [norm_its_weight, mask_its_weight, parametrise_its_weight, double_its_output]
)
@pytest.mark.parametrize("removal", [0.0, 1.0])
def test_a_head_that_does_more_than_to_multiply_by_its_own_weight_stays(change, removal):
    dense, images = small(), pictures(24)
    change(dense.head)
    assert linear_heads(dense, images) == []
    student, _ = compress(dense, images, Compression(macs=0.7, removal=removal))
    assert student(images).shape == (24, 5)
    if removal == 0.0:
        features = torch.randn(4, dense.head.in_features)
        assert torch.equal(student.head(features), dense.head(features))


def test_few_images_do_not_make_a_head_worse_on_others():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    ).eval()
    other = copy.deepcopy(model)
    # What is lost is noise to the head: nothing that it could mend.
    with torch.no_grad():
        other[0].weight[:32] = 0.3 * torch.randn_like(other[0].weight[:32])
    images, unseen = pictures(1012).split([12, 1000])
    before = difference(model, other, unseen)
    refit_heads(other, Reference(model), Calibration.of(images))
    assert difference(model, other, unseen) < 1.2 * before


def test_a_single_image_leaves_heads_as_they_are():
    model = Heads().eval()
    other = copy.deepcopy(model)
    refit_heads(other, Reference(model), Calibration.of(pictures(1)))
    assert torch.equal(other.head.weight, model.head.weight)


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 19), seed=st.integers(0, 100))
def test_moments_of_two_halves_are_joined_to_those_of_all(cut, seed):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(20, 3, 1, 1, generator=generator, dtype=torch.double)
    y = torch.randn(20, 3, 1, 1, generator=generator, dtype=torch.double) + 2
    one, other = (gather_moments([(z[part], y[part])], 1) for part in (slice(cut), slice(cut, 20)))
    joined = _joined(one, other, [cut / 20, 1 - cut / 20])
    whole = gather_moments([(z, y)], 1)
    for field in ("zz", "zy", "yy", "z_mean", "y_mean"):
        torch.testing.assert_close(getattr(joined, field), getattr(whole, field))
