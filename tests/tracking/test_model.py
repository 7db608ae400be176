"""An exported student as a model in MLflow, that runs without this project."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sbf_dist import tracking
from sbf_dist.export.onnx import export_onnx
from sbf_dist.export.saved import Card
from sbf_dist.export.sbf_student import Student
from sbf_dist.tracking import model as mlflow_model

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
        crop=0.9,
        plan_digest="0" * 64,
    )
    path = tmp_path_factory.mktemp("onnx") / "student.onnx"
    export_onnx(model, path, card)
    return path


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """Encoded pictures of several sizes, half of them with little green."""
    draw = np.random.default_rng(1)
    found = []
    for number in range(70):
        pixels = draw.integers(0, 256, (20 + number, 30, 3), np.uint8)
        if number % 2:
            pixels //= np.array([1, 8, 1], np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG" if number % 3 else "JPEG")
        found.append(file.getvalue())
    return found


def expected(onnx_file: Path, pictures: list[bytes]) -> dict[str, np.ndarray]:
    student = Student(onnx_file)
    return student.predict(np.stack([student.read(picture) for picture in pictures]))


def test_stored_student_predicts_the_same_in_a_process_without_torch(
    onnx_file: Path, pictures: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for number, picture in enumerate(pictures):
        (tmp_path / f"{number:02}.image").write_bytes(picture)
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    with tracking.start(folder) as run:
        run.log_student(onnx_file, registered_name="test-student")
        assert run.flush(120)
        client = mlflow.MlflowClient(run.uri)
        info = client.get_run(run.run_id).info
        assert info.status == "RUNNING"
        assert run.page == (
            f"#/experiments/{info.experiment_id}/runs?workflowType=machine_learning"
        )
    (model,) = client.search_logged_models([info.experiment_id])
    assert (model.name, model.source_run_id) == ("student", run.run_id)
    uri = model.model_uri
    code = """
        import sys
        sys.modules["torch"] = sys.modules["sbf_dist"] = None  # importing them fails
        import mlflow, pandas
        from pathlib import Path
        images = [path.read_bytes() for path in sorted(Path(sys.argv[2]).glob("*.image"))]
        found = mlflow.pyfunc.load_model(sys.argv[1]).predict(pandas.DataFrame({"image": images}))
        found.to_json(sys.argv[3])
        """
    output = str(tmp_path / "found.json")
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), uri, str(tmp_path), output],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MLFLOW_TRACKING_URI": run.uri},
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(Path(output).read_text())
    wanted = expected(onnx_file, pictures)
    assert len(set(wanted["class"])) > 1
    assert list(found["class"].values()) == wanted["class"].tolist()
    answered = np.array(list(found["probabilities"].values()))
    np.testing.assert_allclose(answered, wanted["probabilities"], atol=1e-6)
    (version,) = client.search_model_versions("name = 'test-student'")
    assert version.run_id == run.run_id
    mlflow.set_tracking_uri(run.uri)
    described = mlflow.models.get_model_info(uri)
    assert [(one.name, one.type.name) for one in described.signature.inputs] == [
        ("image", "binary")
    ]
    assert described.saved_input_example_info is not None
    pinned = Path(mlflow.pyfunc.get_model_dependencies(uri)).read_text().split()
    needed = {line.partition("==")[0] for line in pinned}
    assert needed == {"mlflow", "numpy", "onnxruntime", "pillow"}


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a model on this machine alone; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true"}
    words = ("models", "serve", "--env-manager", "local", "--host", "127.0.0.1", "--port", port)
    process = subprocess.Popen(
        [str(programs / "mlflow"), *map(str, words), "--model-uri", str(folder)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 240
        while not _answers(f"{address}/ping"):
            assert process.poll() is None, "mlflow models serve has ended"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=120)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.slow  # a server of MLflow's takes ten seconds to start
def test_a_served_student_answers_a_picture_over_http(
    onnx_file: Path, pictures: list[bytes], tmp_path: Path
) -> None:
    mlflow_model.save_student(onnx_file, tmp_path / "student")
    wanted = expected(onnx_file, pictures[:2])
    with served(tmp_path / "student") as address:

        def post(contents: list[bytes]) -> list[dict]:
            rows = [[base64.b64encode(content).decode()] for content in contents]
            body = {"dataframe_split": {"columns": ["image"], "data": rows}}
            request = urllib.request.Request(
                f"{address}/invocations",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=240) as answer:
                return json.load(answer)["predictions"]

        found = post(pictures[:2])
        with pytest.raises(urllib.error.HTTPError) as refused:
            post([pictures[0], b"no image"])
    assert [one["class"] for one in found] == wanted["class"].tolist()
    answered = [one["probabilities"] for one in found]
    np.testing.assert_allclose(answered, wanted["probabilities"], atol=1e-6)
    assert refused.value.code == 400
    assert "image in row 1: not a readable image" in refused.value.read().decode()
