"""Looking into a converted layer: what is shown is what the layer has."""

import numpy as np
import pytest
import torch
from torch import nn

from sbf_dist.compression.convert import convert
from sbf_dist.compression.plan import Plan, Removed, SBFLayer
from sbf_dist.report.layer_views import chosen_layers, view_layers


def sbf(channels: int, kept: list[int], sources: list[list[int]], **values) -> SBFLayer:
    return SBFLayer(
        channels=channels,
        kept=kept,
        sources=sources,
        macs_before=2,
        macs_after=1,
        reason="",
        **{"transform_size": 1, "error": 0.1} | values,
    )


def plan(layers: dict[str, SBFLayer], **values) -> Plan:
    return Plan(
        model="small",
        classes=0,
        input_shape=(3, 6, 6),
        budget={"macs": 0.5},
        macs_before=2,
        macs_after=1,
        params_before=2,
        params_after=1,
        layers=layers,
        **values,
    )


@pytest.fixture
def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False)).eval()


IMAGE = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_a_channel_that_is_rebuilt_exactly_has_the_same_filter_and_map(dense):
    with torch.no_grad():
        dense[0].weight[3] = 2 * dense[0].weight[0] - dense[0].weight[2]
    planned = plan({"0": sbf(4, [0, 1, 2], [[0, 1, 2]])})
    student = convert(dense, planned).eval()
    with torch.no_grad():
        student[0].transforms[:] = torch.tensor([2.0, 0.0, -1.0]).view(1, 3, 1, 1)
    (view,) = view_layers(dense, student, planned, ["0"], IMAGE)
    assert (view.kept_of, view.rebuilt_of, list(view.kept)) == (3, 1, [0, 1, 2])
    (channel,) = view.channels
    assert channel.channel == 3
    assert channel.error == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(channel.dense, channel.rebuilt, atol=1e-6)
    np.testing.assert_allclose(channel.dense_map, channel.rebuilt_map, atol=1e-5)
    assert channel.sources[-1].channel == 1  # adds nothing
    assert {s.channel: s.kernel.item() for s in channel.sources} == {0: 2.0, 1: 0.0, 2: -1.0}


def test_larger_transformations_are_compared_with_the_padded_dense_filter(dense):
    planned = plan({"0": sbf(4, [0, 1], [[0], [1]], transform_size=3)})
    (view,) = view_layers(dense, convert(dense, planned).eval(), planned, ["0"], None)
    first = view.channels[0]
    assert first.dense.shape == first.rebuilt.shape == (3, 5, 5)
    np.testing.assert_array_equal(first.dense[:, 1:4, 1:4], dense[0].weight[2].detach())
    assert (first.error, first.dense_map) == (None, None)


def test_channels_have_their_numbers_in_the_dense_network_where_others_are_removed(dense):
    removed = {"0": Removed(out=[1])}
    planned = plan({"0": sbf(3, [0, 1], [[0]])}, removed=removed)
    (view,) = view_layers(dense, convert(dense, planned).eval(), planned, ["0"], IMAGE)
    assert list(view.kept) == [0, 2]
    assert view.channels[0].channel == 3
    np.testing.assert_array_equal(view.channels[0].dense, dense[0].weight[3].detach())


def test_no_filter_is_shown_where_none_equals_the_layer(dense):
    planned = plan({"0": sbf(4, [0, 1], [[0], [1]], between="bn_relu")})
    (view,) = view_layers(dense, convert(dense, planned).eval(), planned, ["0"], IMAGE)
    assert all(one.dense is None and one.rebuilt is None for one in view.channels)
    assert view.channels[0].error <= view.channels[1].error


def test_the_best_the_middling_and_the_worst_layer_are_chosen():
    errors = {"a": 0.3, "b": 0.1, "c": 0.5, "d": 0.4, "e": 0.2}
    layers = {name: sbf(2, [0], [[0]], error=error) for name, error in errors.items()}
    assert chosen_layers(plan(layers)) == ["a", "b", "c"]
