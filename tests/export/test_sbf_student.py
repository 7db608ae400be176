from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sbf_dist.export.onnx import export_onnx
from sbf_dist.export.saved import Card
from sbf_dist.export.sbf_student import Student


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture(scope="module")
def path(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    card = Card(
        model="test",
        classes=["ant", "bee", "cat", "dog"],
        input_shape=(3, 8, 6),
        mean=[0.5, 0.4, 0.3],
        std=[0.25, 0.2, 0.5],
        plan_digest="0" * 64,
    )
    path = tmp_path_factory.mktemp("onnx") / "student.onnx"
    export_onnx(network, path, card)
    return path


def test_bytes_are_normalised_and_classified_as_by_the_network(
    path: Path, network: nn.Module
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (130, 8, 6, 3), np.uint8)
    x = torch.from_numpy(images).float().permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.25, 0.2, 0.5]).view(
        3, 1, 1
    )
    expected = network(x).softmax(1).detach()
    found = Student(path).predict(images)
    np.testing.assert_allclose(found["probabilities"], expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(found["probability"], expected.amax(1).numpy(), atol=1e-5)
    names = np.array(["ant", "bee", "cat", "dog"])
    assert found["class"].tolist() == names[expected.argmax(1).numpy()].tolist()


def test_floats_mean_the_same_as_bytes(path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), np.uint8)
    student = Student(path, threads=1)
    from_bytes = student.predict(images)["probabilities"]
    from_floats = student.predict(images / 255.0)["probabilities"]
    np.testing.assert_allclose(from_floats, from_bytes, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 3, 8, 6), np.uint8), r"\(2, 3, 8, 6\); expected \(N, 8, 6, 3\)"),
        (np.zeros((8, 6, 3), np.uint8), r"\(8, 6, 3\); expected"),
        (np.zeros((2, 8, 6, 3), np.int64), "int64; expected uint8"),
        (np.zeros((2, 8, 6, 3), bool), "bool; expected uint8"),
        (np.zeros((0, 8, 6, 3), np.uint8), "expected at least one image"),
        (np.full((2, 8, 6, 3), np.nan), "hold NaN or infinity"),
        (np.full((2, 8, 6, 3), 200.0), r"floats in \[200, 200\], not in \[0, 1\]: .* as uint8"),
        (np.full((2, 8, 6, 3), -1.5), r"floats in \[-1.5, -1.5\].* normalised, leave that"),
    ],
)
def test_other_shapes_and_types_are_refused(path: Path, images: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Student(path).predict(images)
