import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sbf_dist.compression.cost import count
from sbf_dist.layers import SBFConv2d


def test_convolutions_and_linear_layers_are_counted_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, (3, 1), stride=2, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(6 * 4 * 5, 7),
    )
    cost = count(model, (3, 9, 10))
    macs = {
        "0": 9 * 10 * 8 * 3 * 9,
        "3": 4 * 5 * 6 * 4 * 3,
        "5": 120 * 7,
    }
    assert cost.layers == macs
    assert cost.macs == sum(macs.values())
    assert cost.params == (3 * 9 * 8 + 8) + 16 + 6 * 4 * 3 + (120 * 7 + 7)


@settings(max_examples=15, deadline=None)
@given(
    channels=st.integers(1, 6),
    kept=st.integers(1, 5),
    rebuilt=st.integers(0, 5),
    sources=st.integers(1, 3),
    size=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 2),
    side=st.integers(6, 9),
)
def test_sbf_layer_costs_what_its_formula_says(
    channels, kept, rebuilt, sources, size, stride, side
):
    layer = SBFConv2d(
        channels,
        kept + rebuilt,
        3,
        kept=range(kept),
        sources=[[(p + s) % kept for s in range(sources)] for p in range(rebuilt)],
        transform_size=size,
        stride=stride,
        padding=1,
    )
    cost = count(nn.Sequential(layer), (channels, side, side))
    positions = (-(-side // stride)) ** 2
    per_position = kept * channels * 9 + rebuilt * sources * size**2
    assert cost.macs == positions * per_position
    assert cost.layers["0"] == cost.macs
    assert cost.params == per_position + kept + rebuilt


def test_containers_include_their_children_and_functional_calls_count():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))
            self.block = nn.Sequential(nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 1))

        def forward(self, x):
            return self.block(F.conv2d(x, self.weight))

    cost = count(Functional(), (3, 5, 5))
    assert cost.layers == {"block": 25 * 12, "block.0": 25 * 8, "block.1": 25 * 4}
    assert cost.macs == 25 * (12 + 12)


def test_nothing_is_computed_and_the_model_is_left_as_it_was():
    # 40 GB of activations, were they computed.
    model = nn.Sequential(nn.Conv2d(3, 10, 1), nn.Dropout(0.5)).train()
    assert count(model, (3, 32768, 32768)).macs == 2**30 * 30
    assert model.training
    assert model[0].weight.device.type == "cpu"
