"""Networks of all kinds and in all wrappers: compressed, saved, loaded, fused and exported."""

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from networks_of_all_kinds import Embedding, Several, UNet, Yolo, block, pictures_of, ready
from small_networks import small
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import sbf_dist
from sbf_dist import models
from sbf_dist.compression.cost import count
from sbf_dist.compression.named_outputs import named_tensors
from sbf_dist.errors import UserError
from sbf_dist.export.onnx import verify_onnx
from sbf_dist.layers import SBFConv2d
from sbf_dist.settings import Compression
from sbf_dist.surgery import unwrapped

IMAGES = pictures_of(3)
LIGHT = {"sources": 2, "transform_size": 1, "mixtures": False}


def check(
    model: nn.Module, images: Tensor, folder: Path, build: Callable | None, settings: Compression
) -> sbf_dist.Plan:
    """Compress a network; check that what is saved and fused computes the same."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student, plan = sbf_dist.compress(model, images, settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert plan.macs_after <= settings.macs * plan.macs_before
    assert count(student, plan.input_shape).macs == plan.macs_after
    assert any(isinstance(module, SBFConv2d) for module in student.modules())
    assert plan.fidelity is not None
    sbf_dist.save(student, folder / "student")
    loaded = sbf_dist.load(folder / "student", build=build)
    with torch.no_grad():
        wanted = named_tensors(student(images))
        assert list(wanted) == list(named_tensors(model(images)))
        for name, tensor in named_tensors(loaded(images)).items():
            assert torch.equal(tensor, wanted[name]), name
        largest = max(float(tensor.abs().max()) for tensor in wanted.values())
        for name, tensor in named_tensors(sbf_dist.optimize(student)(images)).items():
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-4 * largest, msg=name)
    return plan


@pytest.mark.parametrize("removal", [0.0, 0.5])
@pytest.mark.parametrize("kind", [UNet, Yolo, Embedding, Several])
def test_networks_of_ones_own_are_compressed(kind, removal, tmp_path):
    torch.manual_seed(0)
    images = pictures_of(1) if kind is UNet else IMAGES
    settings = Compression(macs=0.75, removal=removal)
    plan = check(ready(kind(), images), images, tmp_path, kind, settings)
    assert plan.classes == (5 if kind is Several else 0)
    fidelity = plan.fidelity
    assert fidelity is not None
    assert (fidelity.agreement is not None) == (kind is Several)
    assert fidelity.error is not None
    if removal == 0:
        assert fidelity.error < 0.6
    assert "error" in plan.summary()


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [
        (UNet, ["output"]),
        (Yolo, ["maps.0", "maps.1", "anchors"]),
        (Several, ["logits", "box", "more.0"]),
    ],
)
def test_outputs_of_all_kinds_are_exported_under_their_names(kind, outputs, tmp_path):
    torch.manual_seed(0)
    images = pictures_of(1) if kind is UNet else IMAGES
    student, _ = sbf_dist.compress(ready(kind(), images), images, macs=0.75)
    sbf_dist.export_onnx(student, tmp_path / "student.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx")
    assert [one.name for one in session.get_outputs()] == outputs
    assert verify_onnx(tmp_path / "student.onnx", student, images[:3]) < 1e-4


def test_more_budget_leaves_less_error():
    torch.manual_seed(0)
    model = ready(Embedding(), IMAGES)
    errors = [sbf_dist.compress(model, IMAGES, macs=m)[1].fidelity.error for m in (0.4, 0.6, 0.9)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("kind", [UNet, Yolo, Embedding, Several])
def test_nothing_changes_at_the_full_budget(kind):
    torch.manual_seed(0)
    images = pictures_of(1) if kind is UNet else IMAGES
    model = ready(kind())  # its batch norms do not know these images
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var *= 3
    student, plan = sbf_dist.compress(model, images, macs=1.0)
    assert plan.macs_after == plan.macs_before
    others = torch.randn_like(images)
    with torch.no_grad():
        for name, tensor in named_tensors(student(others)).items():
            assert torch.equal(tensor, named_tensors(model(others))[name])


class Frozen(nn.Module):
    """A trunk under no_grad, and convolutions behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.neck = block(3, 16), nn.Sequential(block(16, 24), block(24, 24))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.trunk(x)
        return self.head(self.neck(x).mean((2, 3)))


@pytest.mark.parametrize("removal", [0.0, 0.5])
@pytest.mark.parametrize("criterion", ["reconstruction", "taylor"])
def test_layers_behind_code_without_gradients_are_compressed(removal, criterion):
    torch.manual_seed(0)
    model = ready(Frozen(), IMAGES)
    settings = Compression(macs=0.75, removal=removal, criterion=criterion)
    _, plan = sbf_dist.compress(model, IMAGES, settings)
    assert plan.macs_after <= 0.75 * plan.macs_before
    assert plan.layers["neck.1.0"].kind == "sbf"
    if removal == 0:
        assert "no gradient reaches it" in plan.layers["trunk.0"].reason


def test_layers_on_which_no_chosen_output_depends_stay_dense():
    torch.manual_seed(0)
    model = ready(Yolo(), IMAGES)
    _, plan = sbf_dist.compress(model, IMAGES, Compression(macs=0.85, outputs="maps.0"))
    for name in ("reduce", "expand", "head2"):
        assert "no gradient reaches it from an output that counts" in plan.layers[name].reason
    assert plan.layers["split2"].kind == "sbf"


def test_a_segmentation_network_is_judged_by_its_classes_if_that_is_asked_for():
    torch.manual_seed(0)
    images = pictures_of(1)
    _, plan = sbf_dist.compress(
        ready(UNet(), images), images, Compression(macs=0.7, divergence="kl")
    )
    assert plan.classes == 4
    assert plan.fidelity.agreement > 0.5
    assert plan.fidelity.error is None
    assert "of the dense network's classes" in plan.summary()


@pytest.mark.parametrize(
    "settings", [{"divergence": "error"}, {"divergence": lambda one, other: (one - other).norm()}]
)
def test_a_classifier_is_recognised_whatever_judges_it(settings):
    torch.manual_seed(0)
    images = pictures_of(3, 8, 32)
    model = ready(models.build("timm:test_resnet", 4), images)
    _, plan = sbf_dist.compress(model, images, Compression(macs=0.8, **settings, **LIGHT))
    assert (plan.model, plan.classes) == ("timm:test_resnet", 4)


def test_a_function_of_ones_own_decides_what_is_kept():
    torch.manual_seed(0)
    model = ready(Embedding(), IMAGES)
    settings = Compression(
        macs=0.6, divergence=lambda one, other: 1 - torch.cosine_similarity(one, other).mean()
    )
    student, plan = sbf_dist.compress(model, IMAGES, settings)
    assert plan.fidelity.divergence > 0
    with torch.no_grad():
        similarity = torch.cosine_similarity(student(IMAGES), model(IMAGES)).mean()
    assert similarity == pytest.approx(1 - plan.fidelity.divergence, abs=0.05)


@pytest.mark.parametrize(
    ("name", "arguments", "classes", "macs"),
    [
        ("timm:test_resnet", {"features_only": True}, 0, 0.7),
        ("timm:test_resnet", {"in_chans": 1}, 4, 0.7),
        ("timm:test_efficientnet", {"in_chans": 5}, 0, 0.9),
    ],
)
def test_networks_of_timm_with_other_ends_are_recognised_and_loaded(
    name, arguments, classes, macs, tmp_path
):
    torch.manual_seed(0)
    images = pictures_of(arguments.get("in_chans", 3), 8, 32)
    model = ready(models.build(name, classes, arguments), images)
    plan = check(model, images, tmp_path, None, Compression(macs=macs, **LIGHT))
    assert (plan.model, plan.arguments, plan.classes) == (name, arguments, classes)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("lraspp_mobilenet_v3_large", {}),
        ("deeplabv3_mobilenet_v3_large", {}),
        ("deeplabv3_mobilenet_v3_large", {"aux_loss": True}),
    ],
)
def test_segmentation_networks_of_torchvision_are_recognised(name, arguments):
    model = models.build(f"torchvision:{name}", 5, arguments).eval()
    wanted = models.Architecture(f"torchvision:{name}", 5, arguments)
    assert models.architecture_of(model, 0) == wanted
    assert model(torch.randn(1, 3, 64, 64))["out"].shape == (1, 5, 64, 64)


def test_a_segmentation_network_of_torchvision_is_compressed(tmp_path):
    torch.manual_seed(0)
    images = pictures_of(3, 8, 48)
    model = ready(models.build("torchvision:lraspp_mobilenet_v3_large", 5), images)
    backbone = ["backbone.[4-9]*", "backbone.1*"]  # whose wide layers take long
    settings = Compression(macs=0.97, keep=backbone, refit=False, **LIGHT)
    plan = check(model, images, tmp_path, None, settings)
    assert (plan.model, plan.classes) == ("torchvision:lraspp_mobilenet_v3_large", 5)


def test_the_backbone_of_a_detector_is_compressed(tmp_path):
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    torch.manual_seed(0)
    images = pictures_of(3, 8, 64)
    detector = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None).eval()
    with pytest.raises(UserError, match="of a detector, give the backbone"):
        sbf_dist.compress(detector, images, macs=0.9)
    backbone = ready(detector.backbone, images)
    settings = Compression(macs=0.97, keep=["body.[4-9]*", "body.1*"], refit=False, **LIGHT)

    def build() -> nn.Module:
        built = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
        return built.backbone

    check(backbone, images, tmp_path, build, settings)
    # The student takes the backbone's place.
    detector.backbone = sbf_dist.load(tmp_path / "student", build=build)
    with torch.no_grad():
        assert set(detector(list(images[:1]))[0]) == {"boxes", "labels", "scores"}


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "compiled": torch.compile,
    "averaged": AveragedModel,
    "nested": lambda model: AveragedModel(nn.DataParallel(torch.compile(model))),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_networks_are_compressed_as_if_they_were_not(wrapper, tmp_path):
    torch.manual_seed(0)
    model = ready(Embedding(), IMAGES)
    student, plan = sbf_dist.compress(model, IMAGES, macs=0.6)
    wrapped = WRAPPERS[wrapper](model)
    other, its_plan = sbf_dist.compress(wrapped, IMAGES, macs=0.6)
    assert its_plan == plan
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name])
    converted = sbf_dist.convert(wrapped, plan)
    assert list(converted.state_dict()) == list(student.state_dict())
    sbf_dist.save(WRAPPERS[wrapper](student), tmp_path / "student")
    loaded = sbf_dist.load(tmp_path / "student", build=Embedding)
    optimized = sbf_dist.optimize(WRAPPERS[wrapper](student))
    with torch.no_grad():
        wanted = student(IMAGES)
        assert torch.equal(loaded(IMAGES), wanted)
        torch.testing.assert_close(optimized(IMAGES), wanted)
    if wrapper == "nested":
        sbf_dist.export_onnx(WRAPPERS[wrapper](student), tmp_path / "student.onnx")
        assert verify_onnx(tmp_path / "student.onnx", student, IMAGES) < 1e-4
    smaller, _ = sbf_dist.shrink(WRAPPERS[wrapper](student), plan, IMAGES, Compression(macs=0.5))
    assert unwrapped(smaller) is smaller


def test_modules_that_are_wrapped_inside_a_network_have_their_own_names():
    inner = nn.Sequential(torch.compile(nn.Conv2d(3, 8, 3)), nn.DataParallel(nn.ReLU()))
    model = nn.Sequential(inner, nn.AdaptiveAvgPool2d(1))
    plain = unwrapped(model)
    assert [name for name, _ in plain.named_modules()] == ["", "0", "0.0", "0.1", "1"]
    assert "0.0._orig_mod" in dict(model.named_modules()), "the network itself stays as it is"
    assert plain[0][0].weight.equal(inner[0].weight)
    assert unwrapped(small_one := small()) is small_one
