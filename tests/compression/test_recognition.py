"""Convolutions of other classes, recognised by what they compute."""

import pytest
import torch
from small_networks import Small, pictures, small
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d, StdConv2dSame
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from sbf_dist.compression.convert import convert
from sbf_dist.compression.cost import count
from sbf_dist.compression.joint import plan_jointly
from sbf_dist.compression.one_shot import compress
from sbf_dist.compression.plan import SBFLayer
from sbf_dist.compression.progressive import shrink
from sbf_dist.compression.recognition import Recognised, as_plain, is_plain, recognise
from sbf_dist.export.onnx import export_onnx, verify_onnx
from sbf_dist.export.optimize import optimize
from sbf_dist.export.saved import load_student, save
from sbf_dist.layers import SBFConv2d
from sbf_dist.padding import PaddedConv2d, SamePadding
from sbf_dist.settings import Compression
from sbf_dist.weights import load_state


class StaticSame(nn.Conv2d):
    """As efficientnet_pytorch's Conv2dStaticSamePadding: padded for one size of images."""

    def __init__(self, *shape, image_size, **settings):
        super().__init__(*shape, **settings)
        rule = SamePadding(self.kernel_size, self.stride, self.dilation)
        self.static_padding = nn.ZeroPad2d(rule.amounts(image_size, image_size))

    def forward(self, x):
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride)


class OnTheLeft(nn.Conv2d):
    """Pads by a rule of its own."""

    def forward(self, x):
        return super().forward(F.pad(x, (x.shape[-1] % 3, 0, 0, 0)))


class Attending(nn.Conv2d):
    """Its filters depend on its input."""

    def forward(self, x):
        return self._conv_forward(x, self.weight * x.std(), self.bias)


class Twice(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + super().forward(x.flip(-1))


class Activated(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class OfOneSize(nn.Conv2d):
    """Takes images of one size only, as few as that may be."""

    def forward(self, x):
        if x.shape[-1] != 10:
            raise ValueError(f"size {x.shape[-1]}")
        return self._conv_forward(x, 2 * self.weight, self.bias)


KINDS = {
    "same": lambda: Conv2dSame(8, 12, 3, stride=2),
    "same, dilated": lambda: Conv2dSame(8, 12, (3, 5), stride=(1, 2), dilation=2),
    "same, even": lambda: Conv2dSame(8, 12, 4, stride=3, bias=False),
    "static same": lambda: StaticSame(8, 12, 3, stride=2, image_size=14),
    "torch's same": lambda: parametrizations.weight_norm(nn.Conv2d(8, 12, 4, padding="same")),
    "standardised": lambda: StdConv2d(8, 12, 3, stride=2),
    "standardised, same": lambda: StdConv2dSame(8, 12, 3, stride=2),
    "scaled": lambda: ScaledStdConv2d(8, 12, 3),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(8, 12, 3, padding=1)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(8, 12, 3, groups=2)),
    "reflecting": lambda: parametrizations.weight_norm(
        nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect")
    ),
    "old weight norm": lambda: weight_norm(nn.Conv2d(8, 12, 3, padding=(1, 0))),
    "old spectral norm": lambda: spectral_norm(nn.Conv2d(8, 12, 3)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_what_takes_its_place_gives_the_same_for_any_size(kind):
    torch.manual_seed(0)
    conv = KINDS[kind]().double().eval()
    known = recognise(conv)
    assert isinstance(known, Recognised)
    assert is_plain(known.conv)
    for height, width in [(14, 14), (13, 16), (11, 18), (9, 7), (5, 17)]:
        x = torch.randn(3, 8, height, width, dtype=torch.double)
        torch.testing.assert_close(known.conv(x), conv(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "own"), [("same", True), ("static same", True), ("standardised", False)]
)
def test_own_tells_whether_new_filters_can_be_put_into_the_layer(kind, own):
    known = recognise(KINDS[kind]())
    assert isinstance(known, Recognised)
    assert known.own == own
    assert ("frozen" in known.note) != own


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (OnTheLeft, "OnTheLeft pads by a rule that is not known"),
        (Attending, "Attending has filters that depend on its input"),
        (Twice, "Twice convolves 2 times"),
        (Activated, "Activated computes something else than zero padding and a convolution"),
        (OfOneSize, "OfOneSize cannot be run alone: ValueError: size 5"),
    ],
)
def test_what_is_no_padding_and_a_convolution_is_told(kind, told):
    assert recognise(kind(8, 12, 3)) == told


def test_masks_and_hooks_of_the_users_own_are_not_lost():
    masked = nn.Conv2d(8, 12, 3)
    prune.l1_unstructured(masked, "weight", 0.5)
    assert "would be lost" in recognise(masked)
    hooked = nn.Conv2d(8, 12, 3)
    hooked.register_forward_hook(lambda *_: None)
    assert "would be lost" in recognise(hooked)


def test_recognition_leaves_the_layer_as_it_was():
    conv = parametrizations.spectral_norm(nn.Conv2d(8, 12, 3)).train()
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    recognise(conv)
    assert all(module.training for module in conv.modules())
    for name, value in conv.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_without_values_the_padding_is_known_all_the_same():
    with torch.device("meta"):
        conv = Conv2dSame(8, 12, 3, stride=2)
        standardised = StdConv2dSame(8, 12, 3, stride=2)
    for one, own in ((conv, True), (standardised, False)):
        known = recognise(one)
        assert isinstance(known, Recognised)
        assert known.own == own
        assert isinstance(known.conv, PaddedConv2d)
        assert known.conv.weight.is_meta


# --- whole networks ---


class Odd(Small):
    """A Small whose two convolutions are of a class of their own."""

    def __init__(self, kind=Conv2dSame):
        super().__init__()
        self.conv1 = kind(8, 16, 3, bias=False)
        self.conv2 = kind(16, 16, 3, stride=2, bias=False)


def odd(kind=Conv2dSame):
    """Return an Odd in eval mode whose batch norms know `pictures`."""
    torch.manual_seed(0)
    model, known = Odd(kind), small()
    for name in ("stem", "norm1", "norm2", "head"):
        getattr(model, name).load_state_dict(getattr(known, name).state_dict())
    return model.eval()


def wide(count=64):
    return pictures(count, 11)


@pytest.mark.parametrize("kind", [Conv2dSame, StdConv2d, StdConv2dSame])
def test_a_network_of_them_is_compressed_saved_loaded_optimized_and_exported(kind, tmp_path):
    model, images = odd(kind), wide()
    student, plan = compress(model, images, macs=0.6, name="odd")
    assert {"conv1", "conv2"} >= {n for n, x in plan.layers.items() if isinstance(x, SBFLayer)}
    assert isinstance(student.conv2, SBFConv2d)
    assert kind.__name__ in plan.layers["conv2"].reason
    assert count(student, (3, 11, 11)).macs == plan.macs_after <= 0.6 * plan.macs_before
    wanted = student(images[:8])
    save(student, tmp_path / "student")
    loaded = load_student(tmp_path / "student", build=lambda: odd(kind))
    assert torch.equal(loaded(images[:8]), wanted)
    most = 1e-4 * float(wanted.detach().abs().max())
    torch.testing.assert_close(optimize(student)(images[:8]), wanted, rtol=0, atol=most)
    export_onnx(student, tmp_path / "student.onnx")
    assert verify_onnx(tmp_path / "student.onnx", student, images[:8]) < most


def test_the_student_pads_by_the_size_of_what_it_is_given():
    student, _ = compress(odd(), wide(), macs=0.6, name="odd")
    as_basis = student.conv2.basis
    assert isinstance(as_basis, PaddedConv2d)
    dense = odd().conv2
    for size in (10, 11, 14):
        x = torch.randn(2, 16, size, size)
        kept = list(student.conv2.kept)
        own = Conv2dSame(16, len(kept), 3, stride=2, bias=False)
        own.weight = as_basis.weight
        torch.testing.assert_close(as_basis(x), own(x))
        assert student.conv2(x).shape == dense(x).shape
        with torch.no_grad():
            # One operator, or two with gradients between.
            alone = student.conv2(x)
        torch.testing.assert_close(alone, student.conv2(x))


@pytest.mark.parametrize("kind", [Conv2dSame, StdConv2dSame])
def test_nothing_changes_where_nothing_is_converted(kind):
    model, images = odd(kind), wide()
    student, plan = compress(model, images, macs=1.0, name="odd")
    assert type(student.conv1) is type(student.conv2) is kind
    assert plan.macs_after == plan.macs_before
    torch.testing.assert_close(student(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_layer_that_stays_dense_keeps_its_class_and_a_padded_one_is_solved_anew():
    images = wide()
    for kind, is_solved in ((Conv2dSame, True), (StdConv2dSame, False)):
        model = odd(kind)
        settings = Compression(macs=0.85, keep=["conv2"])
        student, plan = compress(model, images, settings, name="odd")
        assert isinstance(student.conv1, SBFConv2d)
        assert type(student.conv2) is kind
        assert plan.layers["conv2"].kind == "dense"
        # What `keep` names is left; of the others, only filters of a layer's own can be solved.
        assert torch.equal(student.conv2.weight, model.conv2.weight)
        known = recognise(model.conv1)
        assert isinstance(known, Recognised)
        assert known.own == is_solved


@pytest.mark.parametrize("kind", [Conv2dSame, StdConv2dSame])
def test_channels_are_removed_through_them_and_what_was_computed_is_frozen(kind):
    model, images = odd(kind), wide()
    settings = Compression(macs=0.4, removal=1.0)
    student, plan = plan_jointly(model, images, settings, name="odd")
    assert plan.removed["conv1"].out
    assert plan.removed["conv2"].inp
    again = convert(model, plan)
    load_state(again, dict(student.state_dict()))
    assert torch.equal(again.eval()(images), student(images))
    assert type(again.conv2) is (kind if kind is Conv2dSame else PaddedConv2d)


def test_a_padded_layer_is_shrunk_again():
    images = wide()
    student, plan = compress(odd(), images, macs=0.7, name="odd")
    smaller, plan = shrink(student, plan, images, Compression(macs=0.4))
    assert plan.macs_after <= 0.4 * plan.macs_before
    assert isinstance(smaller.conv2.basis, PaddedConv2d)
    again = convert(odd(), plan)
    load_state(again, dict(smaller.state_dict()))
    assert torch.equal(again.eval()(images), smaller(images))


def test_a_time_is_measured_with_the_padding():
    from sbf_dist.compression.planning.latency import Form, build_form

    conv = Conv2dSame(8, 12, 3, stride=2)
    for form in (Form(12), Form(6, 1, 3)):
        assert build_form(conv, form)(torch.randn(1, 8, 11, 11)).shape == (1, 12, 6, 6)
    assert as_plain(conv) is not conv
