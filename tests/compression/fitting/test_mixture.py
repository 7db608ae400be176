import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import pictures, small

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.layerwise import gather_layers
from sbf_dist.compression.fitting.mixture import (
    LEAST_WEIGHT,
    LOW,
    RIDGE,
    RIDGES,
    MixtureSpace,
    _regression,
    best_space,
    install_mixture,
)
from sbf_dist.compression.fitting.statistics import MomentSums, run_until
from sbf_dist.compression.planning.divergence import MixtureTrial, Seen
from sbf_dist.peers.low_rank import reduced_regression

IMAGES = pictures(48)


def random_moments(channels, rank, seed, rows=400):
    """Moments of candidates and of targets that are nearly `rank` combinations of them."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, channels, generator=generator, dtype=torch.double)
    mixed = torch.randn(channels, rank, generator=generator, dtype=torch.double)
    back = torch.randn(rank, channels, generator=generator, dtype=torch.double)
    noise = torch.randn(rows, channels, generator=generator, dtype=torch.double)
    y = z @ mixed @ back + 0.05 * noise + 3
    sums = MomentSums(1)
    sums.add(z.clone(), y)
    return sums.moments(), z, y


@settings(deadline=None, max_examples=30)
@given(channels=st.integers(2, 12), data=st.data(), seed=st.integers(0, 100))
def test_a_mixture_is_what_its_basis_and_transforms_make_of_the_candidates(channels, data, seed):
    kept = data.draw(st.integers(1, channels - 1))
    moments, z, y = random_moments(channels, data.draw(st.integers(1, channels)), seed)
    weights = torch.rand(channels, generator=torch.Generator().manual_seed(seed)) + 0.1
    space = MixtureSpace(moments, weights)
    fit = space.fit(kept)
    assert fit.kept == sorted(set(fit.kept)) and len(fit.kept) == kept
    others = [channel for channel in range(channels) if channel not in fit.kept]
    features = z @ fit.basis.T
    made = torch.empty_like(y)
    made[:, fit.kept] = features
    made[:, others] = features @ fit.transforms.T
    made += fit.bias
    torch.testing.assert_close(made, z @ fit.matrix.T + fit.bias, rtol=1e-5, atol=1e-5)
    error = (made - y).square().mean(0)
    torch.testing.assert_close(error, fit.error, rtol=1e-4, atol=1e-6)
    left = float((weights.double() * error).sum())
    total = float(space.losses()[0])
    assert left == pytest.approx(float(space.losses()[kept]), rel=1e-2, abs=1e-4 * total)


@pytest.mark.parametrize("kept", [1, 3, 7])
def test_the_outputs_are_those_of_a_reduced_rank_regression_of_as_many_features(kept):
    moments, z, _ = random_moments(8, 5, seed=0)
    conv = torch.nn.Conv2d(8, 8, 1, bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(torch.eye(8)[:, :, None, None])
        reduce, expand, bias = reduced_regression(conv, kept, moments)
    fit = MixtureSpace(moments, torch.ones(8)).fit(kept)
    wanted = z @ reduce.flatten(1).T @ expand.T + bias
    torch.testing.assert_close(z @ fit.matrix.T + fit.bias, wanted, rtol=1e-4, atol=1e-4)


def test_channels_that_weigh_more_are_rebuilt_better():
    moments, *_ = random_moments(8, 8, seed=1)
    even = MixtureSpace(moments, torch.ones(8)).fit(3).error
    first = MixtureSpace(moments, torch.tensor([100.0] + [1.0] * 7)).fit(3).error
    assert first[0] < 0.5 * even[0]
    assert first.sum() > even.sum()


def test_only_channels_that_may_be_kept_are():
    moments, *_ = random_moments(8, 8, seed=2)
    space = MixtureSpace(moments, torch.ones(8))
    fit = space.fit(3, among=[1, 2, 5, 6])
    assert set(fit.kept) <= {1, 2, 5, 6}
    torch.testing.assert_close(fit.error, space.fit(3).error, rtol=1e-6, atol=1e-9)


def test_a_channel_that_never_varies_is_no_obstacle():
    _, z, _ = random_moments(6, 3, seed=3)
    y = z.clone()
    y[:, 2] = 7
    sums = MomentSums(1)
    sums.add(z.clone(), y)
    fit = MixtureSpace(sums.moments(), torch.ones(6)).fit(4)
    assert 2 not in fit.kept
    assert fit.bias[2] == pytest.approx(7)
    assert fit.error[2] == pytest.approx(0, abs=1e-6)
    assert fit.transforms.isfinite().all()


def regressed(moments, ridge):
    """The matrix of a space, by a general solve."""
    variance = moments.zz.diagonal()
    added = torch.diag(ridge * variance + RIDGE * variance.mean())
    return torch.linalg.solve(moments.zz + added, moments.zy + added).T


def written_out(moments, weights, ridge, kept):
    """The product of a space's maps, of the symmetric eigenproblem as it is defined."""
    scale = weights.clamp(min=LEAST_WEIGHT * float(weights.mean())).sqrt()
    matrix = torch.eye(len(scale), dtype=torch.double)
    if ridge < math.inf:
        matrix = regressed(moments, ridge)
    outputs = scale[:, None] * (matrix @ moments.zz @ matrix.T) * scale
    _, vectors = torch.linalg.eigh(outputs)
    leading = vectors.flip(1)[:, :kept]
    return leading @ leading.T * scale / scale[:, None] @ matrix


def error_written_out(matrix, moments, held, weights):
    scale = weights.clamp(min=LEAST_WEIGHT * float(weights.mean()))
    shift = held.y_mean - moments.y_mean - matrix @ (held.z_mean - moments.z_mean)
    explained = 2 * (matrix * held.zy.T).sum(1) - ((matrix @ held.zz) * matrix).sum(1)
    return float((scale * (held.yy - explained + shift.square())).sum())


def pair_of_moments(channels, rows, seed):
    fit, *_ = random_moments(channels, channels // 2, seed, rows)
    held, *_ = random_moments(channels, channels // 2, seed + 1, 100)
    return fit, held, torch.rand(channels, dtype=torch.double) + 0.1


# As many rows as channels and more, or less: then what the candidates span is smaller.
@pytest.mark.parametrize("rows", [400, 10])
@pytest.mark.parametrize("ridge", RIDGES)
def test_a_space_of_any_ridge_is_what_its_definition_gives(rows, ridge):
    torch.manual_seed(0)
    fit, held, weights = pair_of_moments(16, rows, seed=0)
    first = MixtureSpace(fit, weights, RIDGES[-1])
    assert (first._factor is None) == (rows > LOW * 16)
    space = first.with_ridge(ridge)
    for kept in (1, 6):
        matrix = written_out(fit, weights, ridge, kept)
        torch.testing.assert_close(space.fit(kept).matrix, matrix, rtol=1e-8, atol=1e-8)
        error = error_written_out(matrix, fit, held, weights)
        assert space.error_on(held, kept) == pytest.approx(error, rel=1e-8)
    again = MixtureSpace(fit, weights, ridge)
    assert torch.equal(again.fit(6).matrix, space.fit(6).matrix)
    assert torch.equal(again.losses(), space.losses())


@pytest.mark.parametrize("seed", range(4))
def test_the_best_space_is_that_of_least_error_on_moments_held_out(seed):
    torch.manual_seed(0)
    fit, held, weights = pair_of_moments(12, 14, seed=2 * seed)
    spaces = [MixtureSpace(fit, weights, ridge) for ridge in RIDGES]
    wanted = min(reversed(spaces), key=lambda space: space.error_on(held, 5))
    found = best_space(fit, held, weights, 5)
    assert torch.equal(found.fit(5).matrix, wanted.fit(5).matrix)


def test_moments_that_rounding_has_left_indefinite_are_regressed_on_all_the_same():
    moments, *_ = random_moments(6, 3, seed=0)
    values, vectors = torch.linalg.eigh(moments.zz)
    values[0] = -0.1 * values[-1]
    spoiled = dataclasses.replace(moments, zz=vectors @ torch.diag(values) @ vectors.T)
    torch.testing.assert_close(_regression(spoiled, RIDGE), regressed(spoiled, RIDGE))


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
def test_the_layer_in_place_gives_what_is_planned_and_what_trials_say(norm):
    model = small(norm=norm)
    ((_, moments),) = gather_layers(model, {"conv2": 1}, Calibration.of(IMAGES))
    fit = MixtureSpace(moments, torch.ones(16)).fit(6)
    student = copy.deepcopy(model)
    planned = install_mixture(student, "conv2", fit, moments, macs=14400)
    outputs = run_until(model, "conv2", IMAGES, output=True)
    made = run_until(student, "conv2", IMAGES, output=True)
    gradient = torch.randn_like(outputs)
    found = MixtureTrial.of(fit).products(Seen.of(gradient, outputs, model.conv2.bias))
    wanted = (gradient * (made - outputs)).sum((1, 2, 3))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().mean()))
    variance = outputs.transpose(0, 1).flatten(1).var(1, correction=0).sum()
    measured = (made - outputs).square().mean((0, 2, 3)).sum() / variance
    assert planned.error == pytest.approx(float(measured), rel=1e-3)
    assert planned.sources == [fit.kept] * 10
    # 6 of 16 filters, and 10 channels of 6 taps each
    assert planned.macs_after == round(14400 * (6 + 10 * 6 / model.conv2.weight[0].numel()) / 16)
