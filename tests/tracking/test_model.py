"""An exported student as a model in MLflow, that runs without this project."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sbf_dist import tracking
from sbf_dist.export.onnx import export_onnx
from sbf_dist.export.saved import Card
from sbf_dist.export.sbf_student import Student

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    with torch.no_grad():
        model[4].weight *= 30
    card = Card(
        model="test",
        classes=["cat", "dog", "gnu"],
        input_shape=(3, 16, 12),
        mean=[0.5, 0.4, 0.3],
        std=[0.25, 0.2, 0.25],
        plan_digest="0" * 64,
    )
    path = tmp_path_factory.mktemp("onnx") / "student.onnx"
    export_onnx(model, path, card)
    return path


def test_stored_student_predicts_the_same_in_a_process_without_torch(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    images = np.random.default_rng(1).integers(0, 256, (70, 16, 12, 3), np.uint8)
    images[::2] //= np.array([1, 8, 1], np.uint8)
    np.save(tmp_path / "images.npy", images)
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    with tracking.start(folder) as run:
        run.log_student(onnx_file, registered_name="test-student")
        assert run.flush(120)
        client = mlflow.MlflowClient(run.uri)
        info = client.get_run(run.run_id).info
        assert info.status == "RUNNING"
    (model,) = client.search_logged_models([info.experiment_id])
    assert (model.name, model.source_run_id) == ("student", run.run_id)
    uri = model.model_uri
    code = """
        import sys
        sys.modules["torch"] = sys.modules["sbf_dist"] = None  # importing them fails
        import mlflow, numpy
        found = mlflow.pyfunc.load_model(sys.argv[1]).predict(numpy.load(sys.argv[2]))
        numpy.savez(sys.argv[3], **found)
        """
    output = str(tmp_path / "found.npz")
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), uri, str(tmp_path / "images.npy"), output],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MLFLOW_TRACKING_URI": run.uri},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    found = np.load(output)
    expected = Student(onnx_file).predict(images)
    assert len(set(expected["class"])) > 1
    assert found["class"].tolist() == expected["class"].tolist()
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=1e-6)
    (version,) = client.search_model_versions("name = 'test-student'")
    assert version.run_id == run.run_id
    requirements = mlflow.pyfunc.get_model_dependencies
    mlflow.set_tracking_uri(run.uri)
    pinned = Path(requirements(uri)).read_text().split()
    assert {line.partition("==")[0] for line in pinned} == {"mlflow", "numpy", "onnxruntime"}
