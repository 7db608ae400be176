"""Networks that name what they give to their layers."""

import pytest
import torch
from small_networks import Small, pictures, small
from torch import Tensor, nn

import sbf_dist
from sbf_dist.compression.candidates import find_candidates
from sbf_dist.export.onnx import verify_onnx
from sbf_dist.settings import Compression


class Naming(Small):
    """A Small that calls all of its layers by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(input=x).relu()
        x = self.norm1(input=self.conv1(input=x)).relu()
        x = self.norm2(input=self.conv2(input=x)).relu()
        return self.head(input=torch.flatten(input=x.mean((2, 3)), start_dim=1))


def naming(**settings) -> nn.Module:
    network = Naming(**settings)
    network.load_state_dict(small(**settings).state_dict())
    return network.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"macs": 0.7},
        {"macs": 0.7, "criterion": "taylor"},
        {"macs": 0.7, "between": "bn_relu"},
        {"macs": 0.7, "removal": 1.0},
        {"macs": 0.7, "removal": 1.0, "criterion": "taylor"},
    ],
)
def test_layers_called_by_keyword_are_compressed_as_any_others(settings):
    images = pictures(24)
    student, plan = sbf_dist.compress(naming(), images, Compression(**settings))
    expected, known = sbf_dist.compress(small(), images, Compression(**settings))
    assert plan.layers == known.layers and plan.removed == known.removed
    assert plan.fidelity == known.fidelity
    assert torch.equal(student(images), expected(images))


def test_students_whose_layers_are_called_by_keyword_are_optimized_and_exported(tmp_path):
    images = pictures(24)
    student, _ = sbf_dist.compress(naming(), images, macs=0.7)
    with torch.no_grad():
        torch.testing.assert_close(sbf_dist.optimize(student)(images), student(images))
    sbf_dist.export_onnx(student, tmp_path / "student.onnx")
    difference = verify_onnx(tmp_path / "student.onnx", student, images[:4])
    assert difference < 1e-4


class OtherName(nn.Conv2d):
    """A convolution with a name of its own for its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_layer_whose_input_has_another_name_stays_dense():
    class Network(Small):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm1(self.conv1(x=self.stem(x).relu())).relu()
            x = self.norm2(self.conv2(x)).relu()
            return self.head(x.mean((2, 3)))

    network = Network()
    network.conv1 = OtherName(8, 16, 3, padding=1)
    reasons, candidates = find_candidates(network.eval(), pictures(2), 1)
    assert "called with x = …" in reasons["conv1"]
    assert candidates == ["conv2"]
