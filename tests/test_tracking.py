import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sbf_dist import tracking
from sbf_dist.errors import UserError
from sbf_dist.export.onnx import export_onnx
from sbf_dist.export.saved import Card
from sbf_dist.export.sbf_student import Student

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project") / "runs"


@pytest.fixture(autouse=True)
def no_uri_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def parent(folder: Path) -> Iterator[tracking.Run]:
    with tracking.start(folder, "pipeline", tags={"seed": 7}) as run:
        yield run


def stored(run: tracking.Run) -> "mlflow.entities.Run":
    return mlflow.MlflowClient(run.address.uri).get_run(run.address.run_id)


def history(run: tracking.Run, name: str) -> list[tuple[int, float]]:
    client = mlflow.MlflowClient(run.address.uri)
    found = client.get_metric_history(run.address.run_id, name)
    return sorted((metric.step, metric.value) for metric in found)


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh process, in the folder of the project."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        timeout=120,
    )


def test_database_and_artifacts_are_in_the_folder(parent: tracking.Run, folder: Path) -> None:
    parent.log_text("hello", "notes/hello.txt")
    assert (folder / "mlflow.db").is_file()
    (found,) = folder.glob("mlflow-artifacts/*/artifacts/notes/hello.txt")
    assert found.read_text() == "hello"


def test_parent_tells_what_code_ran(parent: tracking.Run) -> None:
    tags = stored(parent).data.tags
    assert tags["seed"] == "7"
    assert tags["version.torch"].startswith(torch.__version__.split("+")[0])
    assert tags["version.mlflow"] == mlflow.__version__
    assert "mlflow.source.git.commit" not in tags or tags["git.dirty"] in {"true", "false"}


def test_stages_are_children_and_end_as_they_went(parent: tracking.Run) -> None:
    with parent.stage("compress") as good:
        assert stored(good).info.status == "RUNNING"
    with pytest.raises(ZeroDivisionError), parent.stage("distill") as bad:
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), parent.stage("evaluate") as stopped:
        raise KeyboardInterrupt
    statuses = [stored(run).info.status for run in (good, bad, stopped)]
    assert statuses == ["FINISHED", "FAILED", "KILLED"]
    assert stored(good).data.tags["mlflow.parentRunId"] == parent.address.run_id


def test_pipeline_started_again_continues_its_runs(folder: Path) -> None:
    first = tracking.start(folder, "again", tags={"seed": 1})
    with pytest.raises(RuntimeError), first, first.stage("distill") as stage:
        stage.log_params({"lr": 0.1})
        stage.log_metrics({"loss": 2.0}, step=1)
        raise RuntimeError
    assert stored(first).info.status == "FAILED"
    run_id = first.address.run_id
    with tracking.start(folder, "again", run_id=run_id, tags={"seed": 2, "note": "x"}) as second:
        with second.stage("distill") as continued:
            assert stored(continued).info.status == "RUNNING"
            continued.log_params({"lr": 0.1})
            continued.log_metrics({"loss": 1.0}, step=2)
        with second.stage("evaluate") as other:
            pass
    assert second.address == first.address
    assert continued.address == stage.address != other.address
    assert history(continued, "loss") == [(1, 2.0), (2, 1.0)]
    assert stored(continued).info.status == "FINISHED"
    tags = stored(second).data.tags
    assert (tags["seed"], tags["resumed.seed"], tags["note"]) == ("1", "2", "x")


def test_stage_of_another_pipeline_is_not_continued(parent: tracking.Run, folder: Path) -> None:
    with parent.stage("twin") as one:
        pass
    with tracking.start(folder, "other") as other, other.stage("twin") as two:
        pass
    assert one.address != two.address


def test_nested_parameters_get_names_with_dots(parent: tracking.Run) -> None:
    with parent.stage("params") as run:
        run.log_params(
            {"data": {"root": Path("x"), "mean": [0.5, 0.25], "empty": {}}, "teacher": None}
        )
    assert stored(run).data.params == {
        "data.root": "x",
        "data.mean": "[0.5, 0.25]",
        "teacher": "None",
    }


def test_long_parameter_is_cut_and_many_fit(parent: tracking.Run) -> None:
    with parent.stage("many params") as run:
        run.log_params({"long": "x" * 10_000} | {f"p{i}": i for i in range(250)})
    params = stored(run).data.params
    assert len(params) == 251
    assert params["long"].startswith("xxx")
    assert params["long"].endswith("…")


def test_parameter_that_changes_on_resume_is_told(
    parent: tracking.Run, caplog: pytest.LogCaptureFixture
) -> None:
    with parent.stage("changed") as run:
        run.log_params({"epochs": 10, "lr": 0.1})
        run.log_params({"epochs": 20, "lr": 0.1})
    assert stored(run).data.params["epochs"] == "10"
    assert stored(run).data.tags["resumed.epochs"] == "20"
    assert "epochs was 10, is 20 now" in caplog.text


def test_all_metrics_are_stored_when_a_stage_ends(parent: tracking.Run) -> None:
    with parent.stage("metrics") as run:
        for step in range(100):
            run.log_metrics({"loss": torch.tensor(step / 2), "lr": 0.1}, step)
    assert history(run, "loss") == [(step, step / 2) for step in range(100)]
    assert len(history(run, "lr")) == 100


def test_metrics_that_the_store_refused_are_sent_again(
    parent: tracking.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused:
        def wait(self) -> None:
            raise ConnectionError("gone for a moment")

    send = mlflow.MlflowClient.log_batch

    def log_batch(client, *args, synchronous=True, **kwargs):
        return send(client, *args, **kwargs) if synchronous else Refused()

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
    with parent.stage("hiccup") as run:
        run.log_metrics({"loss": 3.0}, step=5)
    assert history(run, "loss") == [(5, 3.0)]


def test_files_folders_and_figures_are_stored(parent: tracking.Run, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("a")
    with parent.stage("artifacts") as run:
        run.log_artifact(tmp_path / "out" / "a.txt", "one")
        run.log_artifact(tmp_path / "out", "all")
        run.log_dict({"top1": 0.5}, "result.json")
        run.log_figure(Figure(), "plot.png")
    client = mlflow.MlflowClient(run.address.uri)
    read = client.download_artifacts
    assert Path(read(run.address.run_id, "one/a.txt")).read_text() == "a"
    assert Path(read(run.address.run_id, "all/a.txt")).read_text() == "a"
    assert json.loads(Path(read(run.address.run_id, "result.json")).read_text()) == {"top1": 0.5}
    assert Path(read(run.address.run_id, "plot.png")).read_bytes().startswith(b"\x89PNG")


def test_three_processes_attach_and_log_at_once(parent: tracking.Run) -> None:
    code = """
        import sys
        from sbf_dist import tracking
        uri, run_id, rank = sys.argv[1:]
        with tracking.attach(uri, run_id) as run:
            for step in range(20):
                run.log_metrics({f"loss.{rank}": step}, step)
        """
    with parent.stage("workers") as run, ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda rank: python(code, *run.address, str(rank)), range(3)))
        assert [result.returncode for result in results] == [0, 0, 0], results
        assert {result.stdout + result.stderr for result in results} == {""}
        assert stored(run).info.status == "RUNNING"
    for rank in range(3):
        assert len(history(run, f"loss.{rank}")) == 20


def test_new_database_is_made_without_noise_by_drivers_that_start_together(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from sbf_dist import tracking
        tracking.start(Path(sys.argv[1]), "driver").finish()
        """
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: python(code, str(tmp_path / "runs")), range(2)))
    assert [(r.returncode, r.stdout, r.stderr) for r in results] == [(0, "", "")] * 2


def test_relative_sqlite_uri_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = f"sqlite:///{tmp_path}/a/my.db"
    assert tracking.tracking_uri(tmp_path, "sqlite:///a/my.db") == expected
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking.tracking_uri(tmp_path) == "http://tracking:5000"
    assert tracking.tracking_uri(tmp_path, "sqlite:///a/my.db") == expected


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "/tmp/mlruns"])
def test_store_in_files_is_refused_by_its_uri(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=uri):
        tracking.start(tmp_path, "run", uri=uri)


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9", "sqlite:////proc/nothing/mlflow.db", "mysql://u:secret@h/x"]
)
def test_store_that_cannot_be_reached_is_named_without_its_password(
    uri: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        tracking.start(tmp_path, "run", uri=uri)
    assert uri.replace("secret", "***") in str(caught.value)
    assert "secret" not in str(caught.value)


def test_run_that_does_not_exist_is_named(parent: tracking.Run, folder: Path) -> None:
    with pytest.raises(UserError, match="0123abcd"):
        tracking.attach(parent.address.uri, "0123abcd")
    with pytest.raises(UserError, match="0123abcd"):
        tracking.start(folder, "run", run_id="0123abcd")


def test_deleted_run_is_not_continued(folder: Path) -> None:
    with tracking.start(folder, "deleted") as run:
        pass
    mlflow.MlflowClient(run.address.uri).delete_run(run.address.run_id)
    with pytest.raises(UserError, match="was deleted"):
        tracking.start(folder, "deleted", run_id=run.address.run_id)


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
    parent: tracking.Run, onnx_file: Path, tmp_path: Path
) -> None:
    images = np.random.default_rng(1).integers(0, 256, (70, 16, 12, 3), np.uint8)
    images[::2] //= np.array([1, 8, 1], np.uint8)
    np.save(tmp_path / "images.npy", images)
    with parent.stage("export") as run:
        uri = tracking.log_student(run, onnx_file, registered_name="test-student")
        assert stored(run).info.status == "RUNNING"
    code = """
        import sys
        sys.modules["torch"] = sys.modules["sbf_dist"] = None  # importing them fails
        import mlflow, numpy
        found = mlflow.pyfunc.load_model(sys.argv[1]).predict(numpy.load(sys.argv[2]))
        numpy.savez(sys.argv[3], **found)
        """
    output = str(tmp_path / "found.npz")
    result = python(
        code, uri, str(tmp_path / "images.npy"), output, MLFLOW_TRACKING_URI=run.address.uri
    )
    assert result.returncode == 0, result.stderr
    found = np.load(output)
    expected = Student(onnx_file).predict(images)
    assert len(set(expected["class"])) > 1
    assert found["class"].tolist() == expected["class"].tolist()
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=1e-6)
    client = mlflow.MlflowClient(run.address.uri)
    (version,) = client.search_model_versions("name = 'test-student'")
    assert version.run_id == run.address.run_id
    requirements = mlflow.pyfunc.get_model_dependencies
    mlflow.set_tracking_uri(run.address.uri)
    pinned = Path(requirements(uri)).read_text().split()
    assert {line.partition("==")[0] for line in pinned} == {"mlflow", "numpy", "onnxruntime"}


def test_importing_the_library_does_not_load_mlflow() -> None:
    code = """
        import sys
        import sbf_dist, sbf_dist.tracking, sbf_dist.export.saved, sbf_dist.export.onnx
        sys.exit("mlflow" in sys.modules)
        """
    assert python(code).returncode == 0
