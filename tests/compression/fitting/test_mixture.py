import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import pictures, small

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.layerwise import gather_layers
from sbf_dist.compression.fitting.mixture import MixtureSpace, install_mixture
from sbf_dist.compression.fitting.statistics import MomentSums, run_until
from sbf_dist.compression.planning.divergence import MixtureTrial
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
    error, channels = MixtureTrial.of(fit).error(outputs, model.conv2.bias)
    assert channels == list(range(16))
    torch.testing.assert_close(error, made - outputs, rtol=1e-3, atol=1e-4)
    variance = outputs.transpose(0, 1).flatten(1).var(1, correction=0).sum()
    measured = (made - outputs).square().mean((0, 2, 3)).sum() / variance
    assert planned.error == pytest.approx(float(measured), rel=1e-3)
    assert planned.sources == [fit.kept] * 10
    # 6 of 16 filters, and 10 channels of 6 taps each
    assert planned.macs_after == round(14400 * (6 + 10 * 6 / model.conv2.weight[0].numel()) / 16)
