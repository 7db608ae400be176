import re

import pytest
import torch
from small_networks import pictures, small
from torch import nn
from torch.nn.utils import parametrizations, prune

from sbf_dist.compression.candidates import find_candidates, forward_order
from sbf_dist.compression.convert import convert
from sbf_dist.compression.reconstruct import rebuild
from sbf_dist.errors import UserError
from sbf_dist.settings import Compression


class Chain(nn.Module):
    """A stem, the parts that are given one after the other, and the mean of each channel."""

    def __init__(self, *parts, width=16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        x = self.stem(x)
        for part in self.parts:
            x = part(x)
        return x.mean((2, 3))


def plain(**settings):
    return nn.Conv2d(16, 16, 3, padding=1, **settings)


def reason(part, **settings):
    reasons, candidates = find_candidates(Chain(part).eval(), pictures(2), 3, **settings)
    assert candidates == [name for name in candidates if name not in reasons]
    return reasons.get("parts.0")


def test_a_plain_convolution_is_a_candidate_whatever_its_settings():
    assert reason(plain()) is None
    assert reason(plain(bias=False, padding_mode="reflect")) is None
    assert reason(nn.Conv2d(16, 24, (1, 3), stride=2, dilation=2)) is None


def test_a_subclass_that_only_has_another_constructor_is_plain():
    class Square(nn.Conv2d):
        def __init__(self, channels):
            super().__init__(channels, channels, 3, padding=1)

    assert reason(Square(16)) is None


def test_subclasses_of_the_libraries_that_pad_or_standardise_are_candidates():
    from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d

    for kind in (StdConv2d, ScaledStdConv2d, Conv2dSame):
        assert reason(kind(16, 16, 3)) is None


def test_a_convolution_whose_filters_are_computed_is_a_candidate():
    assert reason(parametrizations.weight_norm(plain())) is None


def test_what_a_subclass_does_on_the_images_alone_is_seen():
    class SometimesMore(nn.Conv2d):
        def forward(self, x):
            # On the images, but not on the small noise that it is tried on.
            return super().forward(x) + (x.shape[-1] == 10)

    told = "SometimesMore computes something else than zero padding and a convolution"
    assert reason(SometimesMore(16, 16, 3, padding=1)) == told


def test_a_convolution_with_hooks_stays_dense():
    masked = plain()
    prune.l1_unstructured(masked, "weight", 0.5)
    assert "forward hooks" in reason(masked)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (nn.Conv2d(16, 16, 3, groups=16), "depthwise convolution: "),
        (nn.Conv2d(16, 32, 3, groups=16), "depthwise convolution: "),
        (nn.Conv2d(16, 8, 3, groups=8), "its 8 groups have one channel each"),
        (nn.Conv2d(16, 16, 3, groups=4), None),
        (nn.Conv2d(16, 1, 3), "it has one channel"),
        (nn.Sequential(nn.Conv2d(16, 4, 1), nn.Conv2d(4, 9, 1)), None),
    ],
)
def test_what_cannot_be_converted_says_why(part, told):
    found = reason(part)
    assert found is None if told is None else found.startswith(told)


def test_a_filter_that_is_as_cheap_as_rebuilding_is_left():
    reasons, candidates = find_candidates(
        Chain(nn.Conv2d(16, 9, 1), nn.Conv2d(9, 12, 1)).eval(), pictures(2), 3
    )
    told = "a filter costs 9 multiply-adds, rebuilding a channel at least 9"
    assert reasons["parts.1"] == told
    assert candidates == ["parts.0"]


def test_a_convolution_that_is_used_twice_stays_dense_alone():
    shared = plain()
    reasons, candidates = find_candidates(Chain(shared, plain(), shared).eval(), pictures(2), 3)
    assert reasons["parts.0"].startswith("used 2 times in a forward pass")
    assert candidates == ["parts.1"]


class Gated(nn.Module):
    """Squeeze-and-excitation with as many channels in the middle as images have."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(16, 3, 1), nn.Conv2d(3, 16, 1)

    def forward(self, x):
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def test_squeeze_and_excitation_is_not_worth_it():
    reasons, candidates = find_candidates(
        Chain(plain(), Gated(), plain()).eval(), pictures(2, size=16), 3
    )
    assert reasons["parts.1.down"].startswith("its map is 1 x 1")
    assert "rebuilding a channel" in reasons["parts.1.up"], "3 channels are no stem"
    assert candidates == ["parts.0", "parts.2"]


def test_layers_on_small_maps_that_cost_something_are_candidates():
    tail = nn.Conv2d(16, 64, 3, padding=1)
    _, candidates = find_candidates(Chain(nn.AdaptiveAvgPool2d(1), tail).eval(), pictures(2), 3)
    assert candidates == ["parts.1"]


def test_every_branch_that_reads_the_image_is_a_stem():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return (self.a(x) + self.b(x)).mean((2, 3))

    reasons, candidates = find_candidates(Branches().eval(), pictures(2), 3)
    assert set(reasons.values()) == {"the stem: it reads the image itself"}
    assert not candidates


class Aside(nn.Module):
    """A convolution that runs, and of which nothing comes; one that does not run; a plain one."""

    def __init__(self):
        super().__init__()
        self.stem, self.used = nn.Conv2d(3, 16, 3), plain()
        self.dead, self.detached, self.training_only = plain(), plain(), plain()

    def forward(self, x):
        x = self.stem(x)
        self.dead(x)
        x = self.used(x) + self.detached(x).detach()
        return (x + self.training_only(x) if self.training else x).mean((2, 3))


def test_a_layer_on_which_the_output_does_not_depend_stays_dense():
    reasons, candidates = find_candidates(Aside().eval(), pictures(2), 3)
    assert candidates == ["used"]
    assert reasons["dead"] == reasons["detached"]
    assert "no gradient reaches it from an output that counts" in reasons["dead"]
    assert "training_only" not in reasons


@pytest.mark.parametrize(
    "read",
    [
        lambda x, conv: x.to(conv.weight.dtype),
        lambda x, conv: nn.functional.conv_transpose2d(x, conv.weight),
        lambda x, conv: x + conv.weight.mean(),
    ],
)
def test_a_layer_whose_weight_is_read_elsewhere_stays_dense(read):
    class Reads(Chain):
        def forward(self, x):
            return super().forward(x) + read(self.stem(x), self.parts[0]).mean()

    reasons, candidates = find_candidates(Reads(plain(), plain()).eval(), pictures(2), 3)
    assert reasons["parts.0"].startswith("its weight is read by another module")
    assert candidates == ["parts.1"]


def test_neither_gradients_nor_hooks_remain():
    model = small()
    with torch.no_grad():
        find_candidates(model, pictures(2), 3)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert forward_order(model, pictures(2)) == ["stem", "conv1", "conv2"]


# --- keep ---


def test_layers_that_match_a_pattern_stay_dense():
    reasons, candidates = find_candidates(small(), pictures(2), 3, keep=["conv1", "*2"])
    assert reasons["conv1"] == "kept dense, as requested by 'conv1'"
    assert reasons["conv2"] == "kept dense, as requested by '*2'"
    assert not candidates


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [("conv11", "conv1"), ("cnov2", "conv2"), ("zzz", ""), ("", ""), ("conv[3-9]", "conv")],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(pattern, nearest):
    with pytest.raises(UserError) as told:
        find_candidates(small(), pictures(2), 3, keep=["stem", pattern])
    message = f"keep pattern {pattern!r} matches no convolution; did you mean '{nearest}"
    assert str(told.value).startswith(message)
    assert "\n" not in str(told.value)


def test_the_name_of_a_block_is_answered_with_the_pattern_for_what_is_in_it():
    with pytest.raises(UserError, match=re.escape("did you mean 'parts.*'?")):
        find_candidates(Chain(plain()).eval(), pictures(2), 3, keep=["parts"])


# --- what cannot be compressed ---


def test_a_model_without_convolutions_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(300, 5))
    with pytest.raises(UserError, match=r"^model Sequential has no convolution"):
        find_candidates(model, pictures(2), 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 10, 10), "model Small cannot take images of 1 x 10 x 10: RuntimeError:"),
        (torch.zeros(2, 3, 0, 10), "model Small cannot take images of 3 x 0 x 10: "),
        (torch.zeros(2, 3, 9, 9, dtype=torch.uint8), "images are torch.uint8: expected floats"),
        (torch.zeros(0, 3, 10, 10), "calibration images have shape (0, 3, 10, 10): expected"),
        (torch.zeros(3, 10, 10), "calibration images have shape (3, 10, 10): expected (N, chan"),
    ],
)
def test_images_that_the_network_cannot_take_are_refused(images, message):
    with pytest.raises(UserError) as told:
        find_candidates(small(), images, 3)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_what_a_network_says_of_too_small_images_is_told():
    model = Chain(nn.MaxPool2d(4), nn.MaxPool2d(4)).eval()
    with pytest.raises(UserError, match=r"cannot take images of 3 x 10 x 10: RuntimeError: .*size"):
        find_candidates(model, pictures(2), 3)


@pytest.mark.parametrize(
    ("outputs", "found"),
    [(torch.sum, r"one tensor \(\)"), (lambda x: {"class": x.argmax(1)}, "class"), (len, "int")],
)
def test_a_network_without_an_output_for_each_image_is_refused(outputs, found):
    class Ends(Chain):
        def forward(self, x):
            return outputs(super().forward(x))

    with pytest.raises(UserError, match=f"must return floats with a row for each image.*{found}"):
        find_candidates(Ends(plain()).eval(), pictures(2), 3)


@pytest.mark.parametrize(
    ("model", "images", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(300, 5)), pictures(2), "has no convolution"),
        (small(), torch.zeros(2, 4, 10, 10), "cannot take images of 4 x 10 x 10: RuntimeError"),
        (small(), torch.zeros(0, 3, 10, 10), "calibration images: no image is given"),
        (
            Chain(plain(groups=16), plain(groups=16), nn.Conv2d(16, 8, 3, groups=8)),
            pictures(2),
            "no convolution that an SBF layer could replace; 2 of them: depthwise convolution: a "
            "filter costs no more than rebuilding a channel; 1 of them: the stem",
        ),
    ],
)
def test_compress_tells_in_one_line_what_it_cannot_do(model, images, message):
    with pytest.raises(UserError) as told:
        rebuild(model, images, Compression(macs=0.5), name="mine")
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_a_plan_of_another_network_is_refused_and_the_layer_is_named():
    settings = Compression(macs=0.5, sources=1)
    plan = rebuild(small(), pictures(8), settings, name="small")[1]
    assert plan.layers["conv1"].kind == plan.layers["conv2"].kind == "sbf"
    with pytest.raises(UserError, match=r"gives layer conv1 16 channels, this network 12: .*other"):
        convert(small(width=6), plan)
    with pytest.raises(UserError, match=r"has no layer parts.0: it belongs to 'small'"):
        convert(Chain(plain()), plan)
