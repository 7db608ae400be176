import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import pictures, small
from torch import nn

from sbf_dist.compress.cost import count
from sbf_dist.compress.criteria import Ranking
from sbf_dist.compress.fitting import install, rank_channels
from sbf_dist.compress.options import Search, in_parameters, layer_options
from sbf_dist.compress.statistics import gather_moments, run_until

SHAPE = (3, 10, 10)


@settings(deadline=None)
@given(
    channels=st.integers(1, 600),
    floor=st.floats(0.01, 1),
    round_to=st.sampled_from([1, 2, 8, 16, 32]),
)
def test_kept_channels_come_in_multiples_above_the_floor_and_are_few_numbers(
    channels, floor, round_to
):
    kept = Search(floor=floor, round_to=round_to).kept(channels)
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
    return gather_moments(iter([(z, y)]), size)


@pytest.mark.parametrize(("size", "inner"), [(3, 1), (5, 3), (5, 1), (3, 3)])
def test_moments_of_a_smaller_neighbourhood_are_in_those_of_a_larger(size, inner):
    model = small()
    large, wanted = (moments_of(model, "conv1", m) for m in (size, inner))
    found = large.centre(inner)
    for part in ("zz", "zy", "yy", "z_mean", "y_mean", "drift"):
        torch.testing.assert_close(getattr(found, part), getattr(wanted, part))
    assert found.size == inner


@torch.no_grad()
def options_of(model, name, search):
    cost = count(model, SHAPE)
    conv = model.get_submodule(name)
    return layer_options(
        model,
        name,
        moments_of(model, name, max(search.sizes(conv))),
        pictures(16),
        cost.layers[name],
        torch.ones(conv.out_channels, dtype=torch.double),
        Ranking("reconstruction"),
        search,
    )


def test_options_range_over_kept_channels_sources_and_sizes_below_the_layers_cost():
    model = small(norm=False)
    row = options_of(model, "conv2", Search(sources=3, round_to=2))
    assert (row[0].kept, row[0].sources, row[0].loss) == (16, 0, 0)
    assert {option.size for option in row[1:]} == {1, 3}
    assert {option.sources for option in row[1:]} == {1, 2, 3}
    assert {option.kept for option in row[1:]} == {2, 4, 6, 8, 10, 12, 14}
    assert all(option.cost < row[0].cost for option in row[1:])


def test_a_layer_narrower_than_the_multiple_has_no_options():
    assert len(options_of(small(norm=False), "conv1", Search(round_to=16))) == 1


def built(model, name, option):
    """The network with one option of a layer in place."""
    moments = moments_of(model, name, 3).centre(option.size)
    order = rank_channels(moments, torch.ones(16, dtype=torch.double))
    install(model, name, moments, sorted(order[: option.kept]), option.sources)
    return model


@pytest.mark.parametrize("norm", [True, False])
def test_an_options_costs_are_those_of_the_network_that_has_it(norm):
    dense = count(small(norm=norm), SHAPE)
    model = small(norm=norm)
    row = options_of(model, "conv2", Search(sources=2, round_to=4))
    in_params = in_parameters(model.conv2, row)
    assert in_params[0].cost == sum(p.numel() for p in model.conv2.parameters())
    priced = {(o.kept, o.sources, o.size): o.cost for o in in_params}
    for option in row[1::3]:
        with torch.no_grad():
            after = count(built(small(norm=norm), "conv2", option), SHAPE)
        assert dense.macs - after.macs == row[0].cost - option.cost
        own = priced.get((option.kept, option.sources, option.size))
        if own is not None:
            assert dense.params - after.params == in_params[0].cost - own


def test_options_with_no_fewer_parameters_are_left_out():
    conv = nn.Conv2d(1, 8, 1, bias=False)  # the bias alone of an SBF layer costs as much
    options = [row for row in options_of(small(norm=False), "conv2", Search()) if row.kept <= 8]
    dense = options_of(small(norm=False), "conv2", Search())[0]
    assert in_parameters(conv, [dense, *options]) == [in_parameters(conv, [dense])[0]]
