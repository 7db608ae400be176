"""Fitting, against NumPy's least squares on data that is laid out explicitly."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sbf_dist.compression.fitting.statistics import gather_moments
from sbf_dist.compression.fitting.transforms import RIDGE, fit_transforms, rank_channels


def features(images, channels, height, width, seed=0):
    """Smooth, correlated channels, as a network's are."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(images, channels, height, width, generator=generator, dtype=torch.double)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.double)
    blurred = F.avg_pool2d(raw, 3, 1, 1) + 0.3 * raw
    return torch.einsum("cd,ndhw->nchw", mix, blurred) + 1.5


def rebuilt(z, fit):
    """Apply a fit to basis features (N, B, H, W), target by target."""
    size = fit.transforms.shape[-1]
    channels = []
    for row, kernels, bias in zip(fit.sources.tolist(), fit.transforms, fit.bias, strict=True):
        parts = [
            F.conv2d(z[:, [b]], kernel[None, None], padding=size // 2)
            for b, kernel in zip(row, kernels, strict=True)
        ]
        channels.append(sum(parts)[:, 0] + bias)
    return torch.stack(channels, 1)


def taps_of(z, b, size):
    """The size² shifts of channel b as columns (N · H · W, size²)."""
    border = size // 2
    padded = np.pad(z[:, b].numpy(), ((0, 0), (border, border), (border, border)))
    h, w = z.shape[2:]
    shifts = [padded[:, i : i + h, j : j + w].ravel() for i in range(size) for j in range(size)]
    return np.stack(shifts, 1)


def ridge_lstsq(columns, target):
    """Centred least squares with the ridge as extra rows; coefficients and mean squared residual.

    The ridge is RIDGE times the mean variance of the columns.
    """
    centred = columns - columns.mean(0)
    count, width = centred.shape
    ridge = RIDGE * centred.var(0).mean()
    rows = np.concatenate([centred, np.sqrt(count * ridge) * np.eye(width)])
    right = np.concatenate([target - target.mean(), np.zeros(width)])
    solution, *_ = np.linalg.lstsq(rows, right, rcond=None)
    residual = target - target.mean() - centred @ solution
    return solution, float((residual**2).mean())


@pytest.mark.parametrize(("size", "sources"), [(1, 1), (3, 1), (3, 2), (5, 2)])
def test_transforms_are_numpys_least_squares_solution(size, sources):
    y = features(6, 5, 8, 7)
    z = y[:, :3]
    moments = gather_moments(iter([(y, y)]), size).restrict([0, 1, 2])
    fit = fit_transforms(moments, [3, 4], sources)
    for p, target in enumerate((3, 4)):
        columns = np.concatenate([taps_of(z, b, size) for b in fit.sources[p].tolist()], axis=1)
        wanted = y[:, target].numpy().ravel()
        solution, residual = ridge_lstsq(columns, wanted)
        np.testing.assert_allclose(fit.transforms[p].flatten(), solution, rtol=1e-6, atol=1e-9)
        assert fit.error[p, -1] == pytest.approx(residual, rel=1e-6)
        bias = wanted.mean() - columns.mean(0) @ solution
        assert fit.bias[p] == pytest.approx(bias, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    candidates=st.integers(1, 4),
    targets=st.integers(1, 3),
    sources=st.integers(1, 3),
    size=st.sampled_from([1, 3]),
    height=st.integers(3, 7),
    width=st.integers(3, 7),
    seed=st.integers(0, 100),
)
def test_error_is_the_residual_that_is_measured(
    candidates, targets, sources, size, height, width, seed
):
    y = features(4, candidates + targets, height, width, seed)
    moments = gather_moments(iter([(y, y)]), size).restrict(list(range(candidates)))
    wanted = list(range(candidates, candidates + targets))
    fit = fit_transforms(moments, wanted, sources)
    left = y[:, wanted] - rebuilt(y[:, :candidates], fit)
    variance = y[:, wanted].transpose(0, 1).flatten(1).var(1, correction=0)
    measured = left.square().mean((0, 2, 3))
    torch.testing.assert_close(
        fit.error[:, -1] / variance, measured / variance, rtol=1e-5, atol=1e-9
    )
    # The bias takes the means along.
    assert left.mean((0, 2, 3)).abs().max() < 1e-6 * y.abs().max()
    # Sources are different candidates, and each one helps (or the ridge costs next to nothing).
    used = min(sources, candidates)
    assert fit.sources.shape == (targets, used)
    assert fit.transforms.shape == (targets, used, size, size)
    assert all(len(set(row)) == used for row in fit.sources.tolist())
    steps = fit.error.diff(dim=1) / variance[:, None]
    assert (steps < 1e-3).all()


def test_error_of_fewer_sources_is_that_of_a_fit_with_fewer():
    y = features(5, 8, 6, 6)
    moments = gather_moments(iter([(y, y)]), 3).restrict([0, 1, 2, 3, 4])
    whole = fit_transforms(moments, [5, 6, 7], 4)
    for used in (1, 2, 3):
        part = fit_transforms(moments, [5, 6, 7], used)
        torch.testing.assert_close(whole.error[:, used - 1], part.error[:, -1])
        assert torch.equal(whole.sources[:, :used], part.sources)


def test_first_source_is_the_best_single_candidate():
    y = features(5, 9, 7, 6, seed=3)
    candidates, targets = [0, 1, 2, 3, 4, 5], [6, 7, 8]
    moments = gather_moments(iter([(y, y)]), 3).restrict(candidates)
    fit = fit_transforms(moments, targets, 1)
    for p, target in enumerate(targets):
        wanted = y[:, target].numpy().ravel()
        residuals = [ridge_lstsq(taps_of(y, b, 3), wanted)[1] for b in candidates]
        assert int(fit.sources[p, 0]) == int(np.argmin(residuals))


def test_a_filtered_sum_of_two_channels_is_found_and_recovered():
    z = torch.randn(8, 6, 12, 12, dtype=torch.double)
    kernels = torch.randn(2, 3, 3, dtype=torch.double)
    target = sum(
        F.conv2d(z[:, [b]], kernel[None, None], padding=1)
        for b, kernel in zip((1, 4), kernels, strict=True)
    )
    y = torch.cat([z, target + 7], 1)
    moments = gather_moments(iter([(y, y)]), 3).restrict(list(range(6)))
    fit = fit_transforms(moments, [6], 2)
    assert sorted(fit.sources[0].tolist()) == [1, 4]
    found = dict(zip(fit.sources[0].tolist(), fit.transforms[0], strict=True))
    torch.testing.assert_close(found[1], kernels[0], rtol=0, atol=3e-3)
    torch.testing.assert_close(found[4], kernels[1], rtol=0, atol=3e-3)
    assert fit.error[0, -1] < 1e-6 * target.var()
    assert fit.bias[0] == pytest.approx(7, abs=0.01)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("constant", [0.0, 3.7])
def test_a_channel_without_variance_is_harmless_and_never_a_source(size, constant):
    # In the network's precision: rounding must not look like a feature.
    y = features(16, 6, 9, 9).float()
    y[:, 2] = constant
    whole = gather_moments(iter([(y, y)]), size)
    fit = fit_transforms(whole.restrict([0, 1, 2, 3]), [4, 5], 1)
    if size == 1:  # with shifts, a constant shows where the border is
        assert 2 not in fit.sources
        assert rank_channels(whole, torch.ones(6, dtype=torch.double))[-1] == 2
    left = y[:, [4, 5]].double() - rebuilt(y[:, :4].double(), fit)
    torch.testing.assert_close(
        fit.error[:, -1], left.square().mean((0, 2, 3)), rtol=1e-3, atol=1e-6
    )


def test_sources_are_different_also_where_nothing_is_left_to_explain():
    signal = torch.randn(4, 1, 8, 8, dtype=torch.double)
    y = torch.cat([torch.zeros_like(signal), signal, torch.zeros_like(signal), 2 * signal], 1)
    fit = fit_transforms(gather_moments(iter([(y, y)]), 3).restrict([0, 1, 2]), [3], 3)
    assert fit.sources[0, 0] == 1
    assert sorted(fit.sources[0].tolist()) == [0, 1, 2]
    assert fit.error[0, -1] < 1e-6 * y[:, 3].var()


def explained(y, weights, basis, size):
    """The objective of rank_channels, channel by channel."""
    total = 0.0
    for c in range(y.shape[1]):
        target = y[:, c].numpy().ravel()
        if c in basis:
            best = target.var()
        else:
            best = max(target.var() - residual_bound(y, target, b, size) for b in basis)
        total += float(weights[c]) * best
    return total


def residual_bound(y, target, b, size):
    return ridge_lstsq(taps_of(y, b, size), target)[1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_prefix_of_the_ranking_is_near_the_best_basis_of_its_size(seed):
    y = features(4, 6, 6, 6, seed)
    weights = torch.rand(6, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    ranking = rank_channels(gather_moments(iter([(y, y)]), 3), weights)
    assert sorted(ranking) == list(range(6))
    for kept in (1, 2, 3):
        values = {
            basis: explained(y, weights, basis, 3)
            for basis in itertools.combinations(range(6), kept)
        }
        reached = values[tuple(sorted(ranking[:kept]))]
        best = max(values.values())
        assert reached >= (1 - 1 / np.e) * best
        if kept == 1:
            assert reached == pytest.approx(best, rel=1e-6)


def test_ranking_takes_one_of_each_group_of_copies_first():
    signals = torch.randn(6, 3, 14, 14)
    shifts = [(0, 0), (1, 0), (0, -1), (1, 1)]
    y = torch.cat([torch.roll(signals, shift, (2, 3)) for shift in shifts], 1)
    ranking = rank_channels(gather_moments(iter([(y, y)]), 3), torch.ones(12, dtype=torch.double))
    assert {channel % 3 for channel in ranking[:3]} == {0, 1, 2}


def test_ranking_follows_the_weights():
    y = torch.randn(6, 5, 8, 8)
    weights = torch.tensor([1.0, 2.0, 100.0, 4.0, 0.5], dtype=torch.double)
    ranking = rank_channels(gather_moments(iter([(y, y)]), 1), weights)
    assert ranking == [2, 3, 1, 0, 4]
