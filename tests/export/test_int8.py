"""ONNX files in int8: near those in float, and layers that suffer are named and left in float."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from students import make_student
from torch import nn

from sbf_dist.compression.plan import Plan
from sbf_dist.errors import UserError
from sbf_dist.export import int8
from sbf_dist.export.int8 import LIMIT, Quantised, divergence, quantise_onnx, run_onnx
from sbf_dist.export.onnx import export_onnx
from sbf_dist.export.saved import Card

Pixels = NDArray[np.float32]


def noise(count: int, seed: int) -> Pixels:
    return np.random.default_rng(seed).standard_normal((count, 3, 16, 16)).astype(np.float32)


def quantise(source: Path, target: Path, limit: float = LIMIT) -> Quantised:
    return quantise_onnx(
        source, target, calibration=[noise(16, 1), noise(16, 2)], held_out=noise(16, 3), limit=limit
    )


@pytest.fixture(scope="module")
def in_float(plan: Plan, card: Card, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "student.onnx"
    export_onnx(make_student(plan), path, card)
    return path


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_all_layers_are_quantised_where_predictions_bear_it(in_float: Path, tmp_path: Path) -> None:
    target = tmp_path / "int8.onnx"
    found = quantise(in_float, target, limit=0.2)
    assert found.left_float == []
    wanted = run_onnx(in_float, noise(16, 3))
    assert divergence(run_onnx(target, noise(16, 3)), wanted, logits=True) == pytest.approx(
        found.divergence
    )
    assert 0 < found.divergence < 0.2
    assert target.stat().st_size < 0.7 * in_float.stat().st_size
    weights = {tensor.data_type for tensor in onnx.load(target).graph.initializer}
    assert onnx.TensorProto.INT8 in weights


def test_classes_and_normalisation_stay_and_any_batch_is_taken(
    in_float: Path, card: Card, tmp_path: Path
) -> None:
    quantise(in_float, tmp_path / "int8.onnx", limit=0.2)
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx")
    known = session.get_modelmeta().custom_metadata_map
    assert json.loads(known["sbf.classes"]) == card.classes
    assert json.loads(known["sbf.mean"]) == card.mean
    assert json.loads(known["sbf.precision"]) == "int8"
    for batch in (1, 7):
        assert session.run(None, {"images": noise(batch, 4)})[0].shape == (batch, 10)


class Uneven(nn.Module):
    """Channels of very different sizes between two layers, of which one scale loses the small."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.uneven = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        scale = torch.tensor([3000.0] + 7 * [1.0])
        with torch.no_grad():
            self.uneven.weight *= scale[:, None, None, None]
            self.uneven.bias *= scale
            self.last.weight /= scale[:, None, None]
            self.head.weight *= 20

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(self.uneven(self.first(x).relu()).relu()).relu()
        return self.head(y.mean((2, 3)))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("int8") / "uneven.onnx"
    card = Card(model="uneven", classes=list("abcd"), input_shape=(3, 16, 16), plan_digest="0" * 64)
    export_onnx(Uneven().eval(), path, card)
    return path


def test_a_layer_that_quantises_badly_is_named_and_stays_in_float(
    uneven: Path, tmp_path: Path
) -> None:
    target = tmp_path / "int8.onnx"
    found = quantise(uneven, target)
    names = [layer.name for layer in found.left_float]
    assert 0 < len(names) < found.layers
    assert set(names) <= {"uneven", "last"}
    assert all(layer.divergence > LIMIT / 10 for layer in found.left_float)
    assert {layer.form for layer in found.left_float} == {"dense"}
    assert found.divergence <= LIMIT
    known = onnxruntime.InferenceSession(target).get_modelmeta().custom_metadata_map
    assert json.loads(known["sbf.float_layers"]) == names
    wanted = run_onnx(uneven, noise(32, 9))
    assert divergence(run_onnx(target, noise(32, 9)), wanted, logits=True) < 3 * LIMIT


def test_the_form_of_a_layer_is_said(in_float: Path, tmp_path: Path) -> None:
    trial = int8._Trial(in_float, tmp_path, [noise(2, 1)], noise(2, 3))
    forms = {name: trial.form(name) for name in trial.layers}
    dense = {name for name, form in forms.items() if form == "dense"}
    assert dense == {"conv", "head", "stages.1.0.shortcut.0", "stages.2.0.shortcut.0"}
    assert set(forms.values()) - {"dense"} == {"SBF, kept channels beside depthwise convolutions"}


def test_a_limit_that_nothing_meets_is_an_error(in_float: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"even with all .* layers in float"):
        quantise(in_float, tmp_path / "int8.onnx", limit=-1.0)
    assert list(tmp_path.iterdir()) == []


def test_divergence_is_kl_of_logits_and_a_share_of_the_variance_of_others() -> None:
    draw = np.random.default_rng(0)
    one, other = (draw.standard_normal((50, 4)).astype(np.float32) for _ in range(2))
    p, q = (torch.from_numpy(x).log_softmax(1) for x in (other, one))
    wanted = nn.functional.kl_div(q, p, reduction="batchmean", log_target=True).item()
    assert divergence([one], [other], logits=True) == pytest.approx(wanted, rel=1e-5)
    assert divergence([other], [other], logits=True) == 0
    assert divergence([np.zeros_like(other)], [other], logits=False) == pytest.approx(1, abs=0.1)
