import json
import re
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from students import half_of_every_block, make_student
from torch import Tensor, nn

from sbf_dist.compression.plan import Plan
from sbf_dist.errors import UserError
from sbf_dist.export.fold import UnscaledSBFConv2d, fold_batchnorm
from sbf_dist.export.onnx import OPSET, export_onnx, halve_onnx, verify_onnx
from sbf_dist.export.saved import Card
from sbf_dist.layers import SBFConv2d


@pytest.fixture(scope="module")
def exported(plan: Plan, card: Card, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "new folder" / "student.onnx"
    export_onnx(make_student(plan), path, card)
    return path


def test_file_agrees_with_the_network_for_every_batch_size(
    exported: Path, student: nn.Module
) -> None:
    for batch in (1, 3, 64):
        images = torch.randn(batch, 3, 16, 16)
        assert verify_onnx(exported, student, images) <= 1e-4


def test_file_has_standard_operators_and_no_trace_of_its_origin(exported: Path) -> None:
    proto = onnx.load(exported)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", OPSET)]
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    content = exported.read_bytes()
    assert b"stack_trace" not in content
    assert str(Path(torch.__file__).parents[1]).encode() not in content
    assert [entry.name for entry in exported.parent.iterdir()] == [exported.name]


def test_metadata_tells_what_a_user_needs(exported: Path, card: Card) -> None:
    session = onnxruntime.InferenceSession(exported)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["sbf.classes"]) == card.classes
    assert json.loads(metadata["sbf.mean"]) == card.mean
    assert json.loads(metadata["sbf.std"]) == card.std
    assert json.loads(metadata["sbf.input_shape"]) == [3, 16, 16]
    assert json.loads(metadata["sbf.plan_digest"]) == card.plan_digest


def test_nodes_have_the_names_of_their_layers_and_channels_are_gathered_at_once(
    exported: Path,
) -> None:
    nodes = onnx.load(exported).graph.node
    assert len({node.name for node in nodes}) == len(nodes)
    convs = {node.name.rpartition("/")[0] for node in nodes if node.op_type == "Conv"}
    assert {"conv", "stages.0.0.conv1", "stages.0.0.conv1.basis"} <= convs
    kinds = {node.op_type for node in nodes}
    assert "Gather" in kinds
    assert not {"GatherND", "Transpose"} & kinds


def test_in_half_precision_the_file_takes_and_gives_floats(
    exported: Path, student: nn.Module, tmp_path: Path
) -> None:
    halved = tmp_path / "halved.onnx"
    halve_onnx(exported, halved)
    images = torch.randn(3, 3, 16, 16)
    largest = student(images).abs().max().item()
    assert 0 < verify_onnx(halved, student, images) < 0.02 * largest
    assert halved.stat().st_size < 0.7 * exported.stat().st_size
    known = onnxruntime.InferenceSession(halved).get_modelmeta().custom_metadata_map
    assert json.loads(known["sbf.precision"]) == "fp16"
    assert len(json.loads(known["sbf.classes"])) == 10


def test_batch_size_is_fixed_on_request(tmp_path: Path) -> None:
    plan = half_of_every_block(sources=1)
    student = make_student(plan)
    card = Card.of(plan, classes=list("0123456789"), mean=[0.5] * 3, std=[0.2] * 3)
    path = tmp_path / "student.onnx"
    export_onnx(student, path, card, dynamic_batch=False)
    assert onnxruntime.InferenceSession(path).get_inputs()[0].shape == [1, 3, 16, 16]
    assert verify_onnx(path, student, torch.randn(3, 3, 16, 16)) <= 1e-4


def test_difference_between_file_and_network_is_seen(exported: Path, student: nn.Module) -> None:
    images = torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        student.head.bias[3] += 0.25
    assert verify_onnx(exported, student, images) == pytest.approx(0.25, abs=1e-4)


def test_layer_with_hidden_basis_features_is_exported(card: Card, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = SBFConv2d(3, 10, 3, [0, 1, 4], [[1, 4]] * 7, 3, padding=1)
    nn.init.normal_(layer.transforms)
    norm = nn.BatchNorm2d(10)
    with torch.no_grad():
        norm.weight[1] = 0
    model = nn.Sequential(layer, norm, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    assert isinstance(fold_batchnorm(model)[0], UnscaledSBFConv2d)
    export_onnx(model, tmp_path / "student.onnx", card)
    assert verify_onnx(tmp_path / "student.onnx", model, torch.randn(5, 3, 16, 16)) <= 1e-4


def test_without_a_card_the_shape_is_enough(plan: Plan, tmp_path: Path) -> None:
    student = make_student(plan)
    path = tmp_path / "student.onnx"
    export_onnx(student, str(path), input_shape=(3, 16, 16))
    assert verify_onnx(path, student, torch.randn(5, 3, 16, 16)) <= 1e-4
    assert onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map == {}


def test_the_shape_is_given_once(student: nn.Module, card: Card, tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    with pytest.raises(UserError, match="give either a card or input_shape="):
        export_onnx(student, path, card, input_shape=(3, 16, 16))
    with pytest.raises(UserError, match="plan"):
        export_onnx(nn.Conv2d(3, 4, 3), path)


class BranchOnData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_network_that_cannot_be_exported_is_refused_by_name(card: Card, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'cifar_resnet8' cannot be exported as ONNX"):
        export_onnx(BranchOnData(), tmp_path / "student.onnx", card)
    with pytest.raises(UserError) as error:
        export_onnx(BranchOnData(), tmp_path / "student.onnx", card)
    assert str(error.value).isprintable()  # one line, without escape sequences
    assert not re.search("Next steps|step 1", str(error.value))
    assert list(tmp_path.iterdir()) == []


class CountsImages(nn.Module):
    """Asks for len(x), which plain tracing makes a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.conv(x).view(len(x), 4, -1)
        return features.mean(2), torch.arange(len(x))


class EachImage(CountsImages):
    """Goes through the images one by one."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([features.mean((1, 2)) for features in self.conv(x)])


class OwnAutocast(CountsImages):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = self.conv(x)
        return features.float().mean((2, 3))


def test_a_network_that_asks_how_many_images_come_is_exported_for_any_number(
    tmp_path: Path,
) -> None:
    model = CountsImages().eval()
    path = tmp_path / "network.onnx"
    export_onnx(model, path, input_shape=(3, 16, 16))
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == ["batch", 3, 16, 16]
    for batch in (1, 5):
        images = torch.randn(batch, 3, 16, 16)
        found = session.run(None, {"images": images.numpy()})
        for one, wanted in zip(found, model(images), strict=True):
            torch.testing.assert_close(torch.from_numpy(one), wanted.detach())


def test_a_network_for_a_fixed_number_of_images_is_refused_unless_one_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = EachImage().eval()
    path = tmp_path / "network.onnx"
    with pytest.raises(UserError, match=r"fixes the number of images in a batch: .*2") as error:
        export_onnx(model, path, input_shape=(3, 16, 16))
    assert "\n" not in str(error.value)
    assert not [record for record in caplog.records if record.name == "torch._guards"]
    assert not path.exists()
    export_onnx(model, path, input_shape=(3, 16, 16), dynamic_batch=False)
    assert verify_onnx(path, model, torch.randn(3, 3, 16, 16)) <= 1e-4


def test_types_that_the_standard_does_not_know_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    with pytest.raises(UserError, match=r"'OwnAutocast' cannot be exported.*bfloat16") as error:
        export_onnx(OwnAutocast().eval(), path, input_shape=(3, 16, 16))
    assert "\n" not in str(error.value)
    assert not path.exists()


def test_damaged_file_is_refused_by_name(student: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"student\.onnx cannot be read"):
        verify_onnx(path, student, torch.zeros(1, 3, 16, 16))
