"""Networks of several inputs, of other channels than three, and of any size."""

import pytest
import torch
from networks_of_all_kinds import Embedding, Pair, UNet, pictures_of, ready
from small_networks import small
from torch import nn

import sbf_dist
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.holding_out import split
from sbf_dist.compression.inputs import Packing, number_of_inputs, packing_of, without_packing
from sbf_dist.compression.planning.latency_table import LatencyTable, Timing
from sbf_dist.compression.prepared_images import calibration_for
from sbf_dist.compression.reconstruct import rebuild
from sbf_dist.errors import UserError
from sbf_dist.export.onnx import verify_onnx
from sbf_dist.layers import SBFConv2d
from sbf_dist.settings import Compression

LEFT, RIGHT = pictures_of(3), pictures_of(1, size=6, seed=2)
KINDS = torch.randint(0, 7, (32,), generator=torch.Generator().manual_seed(0))
INPUTS = (LEFT, RIGHT, KINDS)
BATCHES = [
    (*parts, "labels") for parts in zip(*(tensor.split(8) for tensor in INPUTS), strict=True)
]


@pytest.fixture(scope="module")
def pair() -> nn.Module:
    torch.manual_seed(0)
    model = ready(Pair())
    nn.init.normal_(model.head.weight, std=3)
    return model


def test_inputs_come_out_as_they_were_packed():
    packing = Packing.of(INPUTS)
    packed = packing.pack(INPUTS)
    assert packed.shape == (32, 3 * 144 + 36 + 1)
    for one, other in zip(packing.unpack(packed), INPUTS, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    for one, other in zip(packing.unpack(packed.double()), INPUTS, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(packing.unpack(packed[3:5]), INPUTS, strict=True):
        assert torch.equal(one, other[3:5])


def large(first: int) -> tuple[torch.Tensor, ...]:
    return (*INPUTS[:2], torch.arange(first, first + 32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_integers_come_out_as_they_were_whatever_type_the_images_have(dtype):
    images, _, numbers = large(5001)
    inputs = images.to(dtype), numbers
    packing = Packing.of(inputs)
    for packed in (packing.pack(inputs), packing.pack(inputs, torch.float16)):
        assert torch.equal(packing.unpack(packed)[1], numbers)


def test_integers_that_cannot_travel_as_floats_are_refused():
    numbers = calibrated_numbers(large(2**24 - 31)).sort().values
    assert torch.equal(numbers, torch.arange(2**24 - 31, 2**24 + 1))
    message = r"input 3 has integers of up to 16777247 in size, which torch.float32 cannot hold"
    with pytest.raises(UserError, match=message):
        calibrated_numbers(large(2**24))
    # Images in double precision are brought into the network's.
    images, other, numbers = large(2**24)
    with pytest.raises(UserError, match=message):
        calibrated_numbers((images.double(), other, numbers))


def calibrated_numbers(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What the network is given of its third input."""
    calibration = calibration_for(ready(Pair()), [inputs])
    assert calibration.packing is not None
    return calibration.packing.unpack(calibration.first(32))[2]


def test_a_network_takes_packed_inputs_until_it_is_told_not_to(pair):
    packing = Packing.of(INPUTS)
    copied = packing.install(packing.install(ready(Pair())))
    copied.load_state_dict(pair.state_dict())
    assert packing_of(copied) == packing
    assert len(copied._forward_pre_hooks) == 1
    wanted = pair(*INPUTS)
    assert torch.equal(copied(packing.pack(INPUTS)), wanted)
    assert torch.equal(copied(*INPUTS), wanted)
    assert packing_of(without_packing(copied)) is None
    assert torch.equal(copied(*INPUTS), wanted)


def test_a_network_needs_as_many_inputs_as_its_forward_has_without_defaults(pair):
    class Optional(nn.Module):
        def forward(self, x, mask=None, *rest, scale=1.0):
            return x

    assert number_of_inputs(pair) == 3
    assert number_of_inputs(Optional()) == 1
    assert number_of_inputs(nn.Sequential()) == 1
    assert number_of_inputs(torch.jit.trace(small(), pictures_of(3, 2))) == 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (LEFT, "Pair takes 3 inputs; give batches that are tuples of so many tensors"),
        ([(LEFT, RIGHT)], "Pair takes 3 inputs; give batches"),
        ([(LEFT, RIGHT, "kind")], "Pair takes 3 inputs, and a batch has a str among its first 3"),
        ([(KINDS, RIGHT, LEFT)], r"it must be a tensor \(N, C, H, W\)"),
        ([(LEFT, RIGHT, KINDS[:3])], "the inputs of a batch are not equally many"),
        ([BATCHES[0], (LEFT, LEFT, KINDS)], "came where the first inputs are"),
    ],
)
def test_batches_that_do_not_fit_the_inputs_are_refused(pair, images, message):
    with pytest.raises(UserError, match=message):
        sbf_dist.compress(pair, images, macs=0.6)


def test_a_calibration_of_ones_own_names_the_sources_of_several_inputs(pair):
    sources = [number % 4 for number in range(32)]
    given = Calibration(BATCHES, sources=sources)
    images = calibration_for(ready(Pair()), given)
    assert images.image_shape == (3, 12, 12)
    fit, held = split(images)
    assert held is not None and not set(fit.sources) & set(held.sources)
    _, plan = sbf_dist.compress(pair, given, macs=0.6)
    assert len(plan.other_inputs) == 2


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (Calibration.of(LEFT), "Pair takes 3 inputs; give batches that are tuples"),
        (Calibration(BATCHES, packing=Packing.of(INPUTS[:2])), "3 inputs, and 2 are packed"),
    ],
)
def test_a_calibration_of_too_few_inputs_is_refused(pair, images, message):
    with pytest.raises(UserError, match=message):
        sbf_dist.compress(pair, images, macs=0.6)


@pytest.mark.parametrize("removal", [0.0, 1.0, "auto"])
def test_a_network_of_several_inputs_is_compressed_saved_and_exported(pair, removal, tmp_path):
    settings = Compression(macs=0.6, removal=removal, probe_steps=3)
    student, plan = sbf_dist.compress(pair, BATCHES, settings)
    assert plan.macs_after <= 0.6 * plan.macs_before
    assert plan.input_shape == (3, 12, 12)
    assert [(one.shape, one.dtype) for one in plan.other_inputs] == [
        ((1, 6, 6), "float"),
        ((), "int64"),
    ]
    reasons = [layer.reason for layer in plan.layers.values() if layer.kind == "dense"]
    if removal == 0:
        assert any(isinstance(module, SBFConv2d) for module in student.modules())
        assert sum("the stem: it reads the image itself" in reason for reason in reasons) == 2
    assert packing_of(student) is None
    assert packing_of(pair) is None
    with torch.no_grad():
        wanted = student(*INPUTS)
    assert wanted.shape == (32, 5)

    sbf_dist.save(student, tmp_path / "student")
    loaded = sbf_dist.load(tmp_path / "student", build=Pair)
    optimized = sbf_dist.optimize(student)
    with torch.no_grad():
        assert torch.equal(loaded(*INPUTS), wanted)
        torch.testing.assert_close(optimized(*INPUTS), wanted, rtol=1e-4, atol=1e-4)
    if removal == 0:
        sbf_dist.export_onnx(student, tmp_path / "student.onnx")
        assert verify_onnx(tmp_path / "student.onnx", student, INPUTS) < 1e-4


def test_a_student_of_several_inputs_is_shrunk_towards_the_dense_network(pair):
    student, plan = sbf_dist.compress(pair, BATCHES, macs=0.8)
    smaller, new = sbf_dist.shrink(
        student, plan, BATCHES, Compression(macs=0.6), reference=Reference(pair)
    )
    assert new.macs_after <= 0.6 * plan.macs_before
    assert smaller(*INPUTS).shape == (32, 5)
    assert packing_of(smaller) is packing_of(pair) is None


def test_times_are_measured_with_all_inputs(pair, tmp_path):
    timing = Timing(LatencyTable(tmp_path / "times.json"), sbf_dist.optimize)
    prepared = timing.prepare(calibrated(pair))
    assert packing_of(prepared) is not None
    assert prepared(Packing.of(INPUTS).pack(INPUTS)).shape == (32, 5)


def calibrated(model: nn.Module) -> nn.Module:
    copied = ready(Pair())
    copied.load_state_dict(model.state_dict())
    calibration_for(copied, BATCHES)
    return copied


def test_calibration_images_keep_their_packing_where_parts_of_them_are_taken(pair):
    images = calibration_for(ready(Pair()), BATCHES)
    assert images.shape == (3 * 144 + 36 + 1,)
    assert images.image_shape == (3, 12, 12)
    fit, held = split(images)
    assert held is not None
    assert fit.count + held.count == 32
    assert fit.packing == held.packing == images.packing
    again = Calibration.of(fit.first(4), packing=fit.packing)
    assert again.image_shape == (3, 12, 12)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_images_may_have_any_number_of_channels(channels, tmp_path):
    images = pictures_of(channels)
    model = ready(Embedding(channels), images)
    student, plan = sbf_dist.compress(model, images, macs=0.6)
    assert plan.input_shape == (channels, 12, 12)
    assert plan.macs_after <= 0.6 * plan.macs_before
    assert plan.layers["body.0.0"].reason == "the stem: it reads the image itself"
    sbf_dist.save(student, tmp_path / "student", mean=[0.5] * channels, std=[0.2] * channels)
    loaded = sbf_dist.load(tmp_path / "student", build=lambda: Embedding(channels))
    assert torch.equal(loaded(images), student(images))


@pytest.mark.parametrize("size", [(8, 8), (20, 14), (37, 40)])
def test_a_student_takes_images_of_another_size_than_it_was_planned_on(size):
    images = pictures_of(3)
    model = ready(Embedding(), images)
    student, _ = rebuild(model, images, Compression(macs=0.7))
    optimized = sbf_dist.optimize(student)
    others = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert student(others).shape == model(others).shape
        torch.testing.assert_close(optimized(others), student(others), rtol=1e-4, atol=1e-5)


def test_images_need_not_be_square():
    images = pictures_of(1, size=16)[:, :, :10]
    student, plan = sbf_dist.compress(ready(UNet(), images), images, macs=0.7)
    assert plan.input_shape == (1, 10, 16)
    assert student(images).shape == (32, 4, 10, 16)
