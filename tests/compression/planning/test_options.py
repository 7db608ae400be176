import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import pictures, small

from sbf_dist.compression.cost import count
from sbf_dist.compression.fitting.statistics import MomentSums, neighbourhoods, run_until
from sbf_dist.compression.fitting.transforms import install, rank_channels
from sbf_dist.compression.planning.criteria import Ranking
from sbf_dist.compression.planning.divergence import MixtureTrial
from sbf_dist.compression.planning.knapsack import Option, frontier
from sbf_dist.compression.planning.options import (
    EVENNESS,
    Estimated,
    Search,
    Shape,
    estimate_options,
)
from sbf_dist.settings import Compression

SHAPE = (3, 10, 10)


def search(**settings):
    return Search(Compression(macs=0.5, **settings))


@settings(deadline=None)
@given(
    channels=st.integers(1, 600),
    floor=st.floats(0.01, 1),
    round_to=st.sampled_from([1, 2, 8, 16, 32]),
)
def test_kept_channels_come_in_multiples_above_the_floor_and_are_few_numbers(
    channels, floor, round_to
):
    kept = search(floor=floor, round_to=round_to).kept(channels)
    assert all(k % round_to == 0 and round(floor * channels) <= k < channels for k in kept)
    assert len(kept) <= 32
    if channels <= round_to:
        assert not kept
    least = round_to * -(-max(1, round(floor * channels)) // round_to)
    if least < channels:
        assert kept[0] == least, "the floor itself can be reached"


def moments_of(model, name, size):
    y = run_until(model, name, pictures(16), output=True).detach()
    bias = getattr(model, name).bias
    z = y if bias is None else y - bias.detach()[:, None, None]
    sums = MomentSums(size)
    sums.add(neighbourhoods(z, size), neighbourhoods(y, 1))
    return sums.moments()


@pytest.mark.parametrize(("size", "inner"), [(3, 1), (5, 3), (5, 1), (3, 3)])
def test_moments_of_a_smaller_neighbourhood_are_in_those_of_a_larger(size, inner):
    model = small()
    large, wanted = (moments_of(model, "conv1", m) for m in (size, inner))
    found = large.centre(inner)
    for part in ("zz", "zy", "yy", "z_mean", "y_mean", "drift"):
        torch.testing.assert_close(getattr(found, part), getattr(wanted, part))
    assert found.size == inner


def options_of(model, name, limits):
    """The options of one layer, all channels mattering alike; and the layer's shape."""
    conv = model.get_submodule(name)
    shape = Shape.of(conv, count(model, SHAPE).layers[name])
    found = estimate_options(
        shape,
        shape.as_it_is(),
        moments_of(model, name, limits.size(conv)),
        torch.ones(conv.out_channels, dtype=torch.double),
        Ranking("reconstruction"),
        limits,
    )
    return shape, [shape.as_it_is(), *found.options]


def test_options_range_over_kept_channels_sources_and_sizes_below_the_layers_cost():
    _, row = options_of(small(norm=False), "conv2", search(sources=3, round_to=2, mixtures=False))
    assert (row[0].kept, row[0].sources, row[0].loss) == (16, 0, 0)
    assert {option.size for option in row[1:]} == {1, 3}
    assert {option.sources for option in row[1:]} == {1, 2, 3}
    assert {option.kept for option in row[1:]} == {2, 4, 6, 8, 10, 12, 14}
    assert all(option.cost < row[0].cost for option in row[1:])


def test_mixtures_of_the_whole_basis_take_the_place_of_few_sources_without_shifts():
    _, row = options_of(small(norm=False), "conv2", search(sources=3, round_to=2))
    mixed = [option for option in row if option.whole_basis]
    assert [option.kept for option in mixed] == [2, 4, 6, 8, 10, 12, 14]
    assert all((option.sources, option.size) == (option.kept, 1) for option in mixed)
    losses = [option.loss for option in mixed]
    assert losses == sorted(losses, reverse=True)
    assert {(option.sources, option.size) for option in row[1:] if not option.whole_basis} == {
        (1, 3),
        (2, 3),
        (3, 3),
    }


def test_a_mixture_estimates_less_loss_than_any_sources_of_its_basis_without_shifts():
    _, mixed = options_of(small(norm=False), "conv2", search(sources=8, transform_size=1))
    _, few = options_of(
        small(norm=False), "conv2", search(sources=8, transform_size=1, mixtures=False)
    )
    least = {kept: min(o.loss for o in few if o.kept == kept) for kept in range(2, 16)}
    for option in mixed[1:]:
        assert option.loss <= least[option.kept] * (1 + 1e-3)


def test_where_time_is_the_budget_few_sources_are_tried_beside_mixtures():
    _, row = options_of(small(norm=False), "conv2", Search(Compression(latency=0.5, sources=2)))
    assert {(o.size, o.whole_basis) for o in row[1:]} == {(1, False), (1, True), (3, False)}


def test_a_layer_narrower_than_the_multiple_has_no_options():
    assert len(options_of(small(norm=False), "conv1", search(round_to=16))[1]) == 1


def test_what_is_tried_are_options_that_could_be_chosen():
    model = small(norm=False)
    shape = Shape.of(model.conv2, count(model, SHAPE).layers["conv2"])
    found = estimate_options(
        shape,
        shape.as_it_is(),
        moments_of(model, "conv2", 3),
        torch.ones(16, dtype=torch.double),
        Ranking("reconstruction"),
        search(),
    )
    assert [option.size for option in found.tried] == [3, 3, 3, 1, 1, 1], "each m has its scales"
    assert [option.whole_basis for option in found.tried] == [False] * 3 + [True] * 3
    best = [o for m in (1, 3) for o in frontier([o for o in found.options if o.size == m])]
    for option, trial in zip(found.tried, found.trials, strict=True):
        assert option in best
        if isinstance(trial, MixtureTrial):
            matrix = trial.change + torch.eye(len(trial.change))
            assert torch.linalg.matrix_rank(matrix) == option.kept
            continue
        assert len(trial.kept) == option.kept
        assert trial.fit.transforms.shape[1:] == (option.sources, option.size, option.size)


def test_losses_are_scaled_to_the_divergences_of_the_trials_and_more_where_less_is_explained():
    model = small(norm=False)
    shape = Shape.of(model.conv2, count(model, SHAPE).layers["conv2"])
    found = estimate_options(
        shape,
        shape.as_it_is(),
        moments_of(model, "conv2", 3),
        torch.ones(16, dtype=torch.double),
        Ranking("reconstruction"),
        search(),
    )
    doubled = found.scaled([2 * option.loss for option in found.tried])
    total = float(moments_of(model, "conv2", 3).yy.sum())
    for before, after in zip(found.options, doubled, strict=True):
        # With weights of one, the loss is the variance that is not explained.
        added = -EVENNESS * math.log(1 - before.loss / total)
        assert after.loss == pytest.approx(2 * before.loss + added, rel=1e-6)


def test_scales_do_not_jump_between_the_trials():
    options = [Option(k, k, 1, float(k), 10.0 - k, whole_basis=True) for k in range(1, 10)]
    found = Estimated(options, [1.0] * 9, [options[1], options[6]], [])
    scaled = found.scaled([options[1].loss, 8 * options[6].loss])
    scales = [after.loss / before.loss for before, after in zip(options, scaled, strict=True)]
    assert scales[:2] == pytest.approx([1, 1])
    assert scales[6:] == pytest.approx([8, 8, 8])
    steps = [after / before for before, after in itertools.pairwise(scales[1:7])]
    assert steps == pytest.approx([8 ** (1 / 5)] * 5)


def built(model, name, option):
    """The network with one option of a layer in place."""
    moments = moments_of(model, name, 3).centre(option.size)
    order = rank_channels(moments, torch.ones(16, dtype=torch.double))
    install(model, name, moments, sorted(order[: option.kept]), option.sources)
    return model


@pytest.mark.parametrize("norm", [True, False])
def test_an_options_costs_are_those_of_the_network_that_has_it(norm):
    model = small(norm=norm)
    dense = count(model, SHAPE)
    shape, row = options_of(model, "conv2", search(sources=2, round_to=4, mixtures=False))
    in_params = shape.in_parameters(row)
    assert in_params[0].cost == sum(p.numel() for p in model.conv2.parameters())
    priced = {(o.kept, o.sources, o.size): o.cost for o in in_params}
    for option in row[1::3]:
        with torch.no_grad():
            after = count(built(small(norm=norm), "conv2", option), SHAPE)
        assert dense.macs - after.macs == pytest.approx(row[0].cost - option.cost)
        own = priced.get((option.kept, option.sources, option.size))
        if own is not None:
            assert dense.params - after.params == in_params[0].cost - own


def test_options_with_no_fewer_parameters_are_left_out():
    shape = Shape(channels=8, weights=2, macs=1600, params=16)
    row = [shape.as_it_is(), Option(4, 1, 1, shape.option_macs(4, 1, 1), 0.1)]
    assert row[1].cost < row[0].cost
    # 4 filters of 2 weights, 4 taps, and 8 biases that the dense layer does not have
    assert shape.option_params(4, 1, 1) == 20
    assert [option.cost for option in shape.in_parameters(row)] == [16]
