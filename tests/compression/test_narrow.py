import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import pictures, small
from torch import nn
from torch.nn import functional as F

from sbf_dist.compression.narrow import check_fits, narrow
from sbf_dist.compression.plan import Removed
from sbf_dist.errors import UserError


def left(width, removed):
    return sorted(set(range(width)) - set(removed))


@st.composite
def channels(draw, width):
    return sorted(draw(st.sets(st.integers(0, width - 1), min_size=1, max_size=width - 1)))


@settings(deadline=None, max_examples=20)
@given(channels(6), channels(5), st.booleans())
def test_a_narrowed_convolution_is_the_dense_one_without_those_channels(out, inp, bias):
    conv = nn.Conv2d(5, 6, 3, padding=1, stride=2, bias=bias)
    dense = copy.deepcopy(conv)
    narrow(nn.ModuleDict({"conv": conv}), {"conv": Removed(out=out, inp=inp)})
    x = torch.randn(2, 5, 7, 7)
    x[:, inp] = 0
    wanted = dense(x)[:, left(6, out)]
    torch.testing.assert_close(conv(x[:, left(5, inp)]), wanted)
    assert (conv.out_channels, conv.in_channels) == (6 - len(out), 5 - len(inp))
    assert conv.weight.requires_grad


@settings(deadline=None, max_examples=20)
@given(channels(6), channels(5))
def test_a_narrowed_linear_layer_is_the_dense_one_without_those_features(out, inp):
    linear = nn.Linear(5, 6)
    dense = copy.deepcopy(linear)
    narrow(nn.ModuleDict({"linear": linear}), {"linear": Removed(out=out, inp=inp)})
    x = torch.randn(2, 5)
    x[:, inp] = 0
    torch.testing.assert_close(linear(x[:, left(5, inp)]), dense(x)[:, left(6, out)])
    assert (linear.out_features, linear.in_features) == (6 - len(out), 5 - len(inp))


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm2d(6),
        nn.BatchNorm2d(6, affine=False),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.InstanceNorm2d(6, affine=True),
        nn.GroupNorm(6, 6),
        nn.PReLU(6),
        nn.Conv2d(6, 6, 3, groups=6),
    ],
    ids=repr,
)
def test_modules_with_one_number_of_channels_treat_each_channel_as_before(module):
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    dense = copy.deepcopy(module)
    narrow(nn.ModuleDict({"it": module}), {"it": Removed(out=[0, 4])})
    x = torch.randn(3, 6, 5, 5)
    for training in (True, False):
        dense.train(training)
        module.train(training)
        torch.testing.assert_close(module(x[:, [1, 2, 3, 5]]), dense(x)[:, [1, 2, 3, 5]])


def test_a_layer_norm_is_that_of_the_features_that_are_left():
    norm = nn.LayerNorm(6)
    nn.init.uniform_(norm.weight)
    weight = norm.weight.detach()[[1, 2, 3]]
    narrow(nn.ModuleDict({"it": norm}), {"it": Removed(out=[0, 4, 5])})
    x = torch.randn(2, 3)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (3,), weight, norm.bias))


@pytest.mark.parametrize(
    ("module", "removed", "message"),
    [
        (nn.Conv2d(3, 64, 1), {"out": [70]}, "plan removes channel 70 of it, which has 64"),
        (nn.Conv2d(3, 64, 1), {"inp": [3]}, "plan removes input channel 3 of it, which has 3"),
        (nn.Conv2d(3, 2, 1), {"out": [0, 1]}, "plan removes all 2 channels of it"),
        (nn.Linear(2, 3), {"inp": [0, 1]}, "plan removes all 2 input channels of it"),
        (
            nn.BatchNorm2d(4),
            {"out": [1], "inp": [1]},
            "removes input channels of it, a BatchNorm2d",
        ),
        (
            nn.Conv2d(4, 4, 1, groups=4),
            {"inp": [1]},
            "removes input channels of it, a Conv2d whose",
        ),
        (nn.Conv2d(4, 8, 1, groups=4), {"out": [1]}, r"of it, a grouped convolution \(4 groups\)"),
        (nn.Conv2d(8, 4, 1, groups=4), {"out": [1]}, r"of it, a grouped convolution \(4 groups\)"),
        (nn.GroupNorm(2, 4), {"out": [1]}, "of it, a GroupNorm of 2 groups"),
        (nn.LayerNorm((4, 2)), {"out": [1]}, "of it, a LayerNorm over 2 dimensions"),
        (nn.ReLU(), {"out": [1]}, "of it, a ReLU: it has no channels"),
        (nn.ConvTranspose2d(4, 4, 1), {"out": [1]}, "of it, a ConvTranspose2d: it has no"),
    ],
)
def test_what_cannot_be_removed_is_refused_in_one_line_that_names_it(module, removed, message):
    with pytest.raises(UserError, match=message) as error:
        narrow(nn.ModuleDict({"it": module}), {"it": Removed(**removed)})
    assert "\n" not in str(error.value)


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(UserError, match="removes channels of conv9, which this network does not"):
        narrow(small(), {"conv9": Removed(out=[0])})


class Scaled(nn.Conv2d):
    """A convolution with more than weight and bias."""

    def __init__(self):
        super().__init__(3, 4, 1)
        self.gain = nn.Parameter(torch.ones(4))


def test_a_convolution_with_tensors_of_its_own_is_not_cut_blindly():
    with pytest.raises(UserError, match=r"of it, a Scaled with tensors of its own \(gain\)"):
        narrow(nn.ModuleDict({"it": Scaled()}), {"it": Removed(out=[0])})


@pytest.mark.parametrize(
    ("removed", "where"),
    [
        ({"conv1": {"out": [3]}, "norm1": {"out": [3]}}, "conv2"),
        ({"conv1": {"out": [3]}, "conv2": {"inp": [3]}}, "norm1"),
        ({"conv2": {"inp": [3]}}, "conv2"),
        ({"conv2": {"out": [1, 2]}, "norm2": {"out": [1, 2]}, "head": {"inp": [2]}}, "head"),
    ],
)
def test_removals_that_do_not_belong_together_are_refused_with_the_place(removed, where):
    model = small()
    narrow(model, {name: Removed(**channels) for name, channels in removed.items()})
    with pytest.raises(UserError, match=f"does not fit together at or after {where}: ") as error:
        check_fits(model, (3, 10, 10))
    assert "\n" not in str(error.value)


def test_removals_that_belong_together_fit():
    model = small()
    cut = {"conv1": {"out": [3]}, "norm1": {"out": [3]}, "conv2": {"inp": [3]}}
    narrow(model, {name: Removed(**channels) for name, channels in cut.items()})
    check_fits(model, (3, 10, 10))
    assert model(pictures(2)).shape == (2, 5)
