"""What `import sbf_dist` offers, as somebody uses it who brings a network and images."""

import copy
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_networks import Small, pictures, small
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sbf_dist
from sbf_dist import models
from sbf_dist.errors import UserError
from sbf_dist.export.fold import fold_batchnorm

NAMES = {
    "compress", "shrink", "convert", "save", "load", "optimize", "export_onnx", "Budget", "Plan",
    "SBFConv2d", "Compression", "Optimizer", "Augmentation", "PseudoLabels", "LatencyTable",
    "Timing", "DistillationTask", "count", "latencies",
}  # fmt: skip
IMAGES = pictures(48)


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, sbf_dist.Plan]:
    return sbf_dist.compress(small(), IMAGES, macs=0.5)


def test_everything_that_is_offered_is_there():
    assert set(sbf_dist.__all__) == NAMES == set(sbf_dist._HOMES)
    assert set(dir(sbf_dist)) >= NAMES
    for name in NAMES:
        module, _, own = sbf_dist._HOMES[name].partition(":")
        value = getattr(sbf_dist, name)
        assert value is getattr(importlib.import_module(module), own or name)
        assert value.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sbf_dist.nothing  # noqa: B018
    assert (Path(sbf_dist.__file__).parent / "py.typed").exists()


def test_neither_the_library_nor_a_compression_loads_what_it_does_not_use(tmp_path):
    program = f"""
import sys
import sbf_dist
assert "torch" not in sys.modules
import torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from small_networks import pictures, small
student, plan = sbf_dist.compress(small(), pictures(16), macs=0.6)
sbf_dist.save(student, {str(tmp_path / "student")!r})
print(*sorted(sys.modules))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=240
    )
    heavy = {"ray", "deepspeed", "nvidia.dali", "mlflow", "timm", "torchvision", "matplotlib"}
    assert not heavy & set(result.stdout.split())


def test_a_module_and_images_are_enough(made):
    student, plan = made
    assert plan.model == "small_networks:Small"
    assert plan.classes == 5
    assert plan.macs_after <= 0.5 * plan.macs_before
    assert any(isinstance(module, sbf_dist.SBFConv2d) for module in student.modules())
    assert not student.training


@pytest.fixture(scope="module")
def in_batches() -> tuple[nn.Module, sbf_dist.Plan]:
    return sbf_dist.compress(small(), list(IMAGES.split(16)), macs=0.5)


class Stream:
    """Batches that begin anew with each iteration, as a user's own loader gives them."""

    def __iter__(self):
        return iter(IMAGES.split(16))


@pytest.mark.parametrize(
    "images",
    [
        DataLoader(IMAGES, batch_size=16),
        DataLoader(TensorDataset(IMAGES, torch.zeros(len(IMAGES))), batch_size=16),
        Stream(),
        [(part, None) for part in IMAGES.split(16)],
    ],
    ids=["loader", "loader of labelled images", "re-iterable", "list of pairs"],
)
def test_images_come_in_any_form_and_give_the_same_student(in_batches, images):
    student, plan = sbf_dist.compress(small(), images, macs=0.5)
    assert plan == in_batches[1]
    for key, value in in_batches[0].state_dict().items():
        assert torch.equal(student.state_dict()[key], value)


def test_a_loader_that_gives_other_images_each_time_is_refused():
    shuffled = DataLoader(TensorDataset(IMAGES), batch_size=8, shuffle=True)
    with pytest.raises(UserError, match=r"came in another order; give shuffle=False"):
        sbf_dist.compress(small(), shuffled, macs=0.5)
    with pytest.raises(UserError, match="a batch is dict, it must be a tensor"):
        sbf_dist.compress(small(), [{"image": IMAGES}], macs=0.5)


def test_settings_may_bring_the_budget_or_be_given_another():
    settings = sbf_dist.Compression(macs=0.6, keep=["conv1"])
    _, plan = sbf_dist.compress(small(), IMAGES, settings, macs=0.85)
    assert plan.budget == {"macs": 0.85}
    assert plan.layers["conv1"].kind == "dense"
    _, plan = sbf_dist.compress(small(), IMAGES, settings, params=0.9)
    assert plan.budget == {"params": 0.9}
    with pytest.raises(UserError, match="give exactly one of macs, params, latency"):
        sbf_dist.compress(small(), IMAGES)
    removing = sbf_dist.Compression(macs=0.6, removal=0.5)
    with pytest.raises(UserError, match=r"removal = 0\.5 needs a budget of macs or params"):
        sbf_dist.compress(small(), IMAGES, removing, latency=0.5)


def test_settings_may_ask_for_removal():
    settings = sbf_dist.Compression(macs=0.5, removal=1.0)
    _, plan = sbf_dist.compress(small(), pictures(80), settings)
    assert plan.removed


# --- names of networks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "cifar_resnet8", "cifar_resnet14_w12", "cifar_vgg11_w8", "cifar_vgg16", "timm:test_resnet",
        "timm:test_efficientnet", "torchvision:resnet18", "torchvision:mobilenet_v3_small",
        "torchvision:squeezenet1_1", "torchvision:googlenet", "torchvision:vgg11_bn",
        "torchvision:regnet_y_400mf",
    ],
)  # fmt: skip
def test_networks_that_can_be_built_by_name_are_recognised(name):
    assert models.is_buildable(name)
    assert models.architecture_of(models.build(name, 7), 7) == models.Architecture(name, 7)


def test_a_network_that_was_changed_is_not_taken_for_the_one_it_was():
    wider = models.build("timm:test_resnet", 7)
    wider.layer1.add_module("more", nn.Conv2d(8, 8, 1))
    assert models.architecture_of(wider, 7).name == "timm.models.resnet:ResNet"
    strided = models.build("torchvision:resnet18", 7)
    strided.conv1.stride = (1, 1)  # which no tensor shows
    assert models.architecture_of(strided, 7).name == "torchvision.models.resnet:ResNet"
    deeper = models.build("cifar_resnet8", 7)
    deeper.more = nn.Conv2d(3, 3, 3)
    assert models.architecture_of(deeper, 7).name == "sbf_dist.cifar:CifarResNet"
    assert not models.is_buildable("sbf_dist.cifar:CifarResNet")


def test_a_network_of_a_library_is_saved_and_loaded_without_its_builder(tmp_path):
    torch.manual_seed(0)
    model = models.build("torchvision:squeezenet1_1", 5).eval()
    images = pictures(8, 64)
    most = ["features.[4-9]*", "features.1?.*", "classifier.*"]  # wide layers take long
    student, plan = sbf_dist.compress(model, images, sbf_dist.Compression(macs=0.98, keep=most))
    assert plan.model == "torchvision:squeezenet1_1"
    sbf_dist.save(student, tmp_path / "student")
    loaded = sbf_dist.load(tmp_path / "student")
    assert torch.equal(loaded(images[:2]), student(images[:2]))


# --- saving and loading --------------------------------------------------------------------------


def test_a_student_of_ones_own_network_is_saved_and_loaded(made, tmp_path):
    student, _ = made
    sbf_dist.save(student, str(tmp_path / "student"), classes=list("abcde"))
    loaded = sbf_dist.load(str(tmp_path / "student"), build=Small)
    x = pictures(3)
    assert torch.equal(loaded(x), student(x))
    sbf_dist.save(loaded, tmp_path / "again")
    assert torch.equal(sbf_dist.load(tmp_path / "again", build=small)(x), student(x))


def test_without_its_network_loading_says_what_is_needed(made, tmp_path):
    sbf_dist.save(made[0], tmp_path / "student")
    with pytest.raises(UserError, match=r"student of 'small_networks:Small', .*build=MyNet"):
        sbf_dist.load(tmp_path / "student")
    with pytest.raises(UserError, match="build returns a int"):
        sbf_dist.load(tmp_path / "student", build=lambda: 3)
    with pytest.raises(UserError, match="belongs to"):
        sbf_dist.load(tmp_path / "student", build=lambda: models.build("cifar_resnet8", 5))


def test_the_plan_goes_with_copies_and_with_what_shrinking_and_converting_make(made, tmp_path):
    student, plan = made
    copied = copy.deepcopy(student)
    sbf_dist.save(copied.train(), tmp_path / "copy")
    smaller, new = sbf_dist.shrink(copied, plan, IMAGES, sbf_dist.Compression(macs=0.4))
    sbf_dist.save(smaller, tmp_path / "smaller")
    assert sbf_dist.Plan.load(tmp_path / "smaller" / "plan.json").digest() == new.digest()
    sbf_dist.save(sbf_dist.convert(small(), plan), tmp_path / "converted")
    assert student.state_dict().keys() == copied.state_dict().keys()


def test_what_is_no_student_or_not_as_its_plan_has_it_is_not_saved(made, tmp_path):
    student, _ = made
    with pytest.raises(UserError, match="Small has no plan"):
        sbf_dist.save(small(), tmp_path / "student")
    with pytest.raises(UserError, match="has no plan"):
        sbf_dist.save(sbf_dist.optimize(student), tmp_path / "student")
    changed = copy.deepcopy(student)
    changed.conv2 = nn.Identity()
    with pytest.raises(UserError, match=r"not as its plan has it: conv2\.\w+ has another shape"):
        sbf_dist.save(changed, tmp_path / "student")
    with pytest.raises(UserError, match="is not as its plan has it"):
        sbf_dist.save(fold_batchnorm(student), tmp_path / "student")
    with pytest.raises(UserError, match="2 class names for a plan of 5 classes"):
        sbf_dist.save(student, tmp_path / "student", classes=["a", "b"])
    with pytest.raises(UserError, match="mean has 1 values for 3 channels"):
        sbf_dist.save(student, tmp_path / "student", mean=[0.5])
    assert not list(tmp_path.iterdir())


def test_a_name_of_another_network_is_noticed_when_the_student_is_saved(tmp_path):
    student, _ = sbf_dist.compress(small(), IMAGES, macs=0.6, name="cifar_resnet8")
    with pytest.raises(UserError, match="plan has no layer conv: it belongs to"):
        sbf_dist.save(student, tmp_path / "student")


def test_a_student_is_exported_with_what_is_known_of_it(made, tmp_path):
    from sbf_dist.export.onnx import verify_onnx
    from sbf_dist.export.sbf_student import Student

    student, _ = made
    sbf_dist.export_onnx(student, tmp_path / "plain.onnx")
    assert verify_onnx(tmp_path / "plain.onnx", student, pictures(3)) < 1e-4
    with pytest.raises(ValueError, match="does not say how images are normalised"):
        Student(tmp_path / "plain.onnx")
    known = {"classes": list("abcde"), "mean": [0.5] * 3, "std": [0.2] * 3}
    sbf_dist.export_onnx(student, tmp_path / "known.onnx", **known)
    assert list(Student(tmp_path / "known.onnx").classes) == list("abcde")
