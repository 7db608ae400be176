"""What stages and workers log, as MLflow's own store has it in the end."""

import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sbf_dist import tracking
from sbf_dist.errors import UserError
from sbf_dist.tracking import machine

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("project") / "runs" / "pipeline"
    found.mkdir(parents=True)
    return found


@pytest.fixture(autouse=True)
def no_uri_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def parent(folder: Path) -> Iterator[tracking.Run]:
    with tracking.start(folder, tags={"seed": 7}) as run:
        yield run


def stored(run: tracking.Run) -> "mlflow.entities.Run":
    assert run.flush(60) or run.run_id is not None
    return mlflow.MlflowClient(run.uri).get_run(run.run_id)


def history(run: tracking.Run, name: str) -> list[tuple[int, float]]:
    assert run.flush(60)
    found = mlflow.MlflowClient(run.uri).get_metric_history(run.run_id, name)
    return sorted((metric.step, metric.value) for metric in found)


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh process, in the folder of the project."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        timeout=240,
    )


def test_database_and_artifacts_are_beside_the_folder(parent: tracking.Run, folder: Path) -> None:
    parent.log_text("hello", "notes/hello.txt")
    assert parent.flush(60)
    assert (folder.parent / "mlflow.db").is_file()
    (found,) = folder.parent.glob("mlflow-artifacts/*/artifacts/notes/hello.txt")
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
    assert parent.flush(60)
    statuses = [stored(run).info.status for run in (good, bad, stopped)]
    assert statuses == ["FINISHED", "FAILED", "KILLED"]
    assert stored(good).data.tags["mlflow.parentRunId"] == parent.run_id


def test_pipeline_started_again_continues_its_runs(folder: Path) -> None:
    mine = folder.with_name("again")
    mine.mkdir()
    first = tracking.start(mine, tags={"seed": 1})
    with pytest.raises(RuntimeError), first, first.stage("distill") as stage:
        stage.log_params({"lr": 0.1})
        stage.log_metrics({"loss": 2.0}, step=1)
        raise RuntimeError
    assert stored(first).info.status == "FAILED"
    with tracking.start(mine, tags={"seed": 2, "note": "x"}) as second:
        with second.stage("distill") as continued:
            assert stored(continued).info.status == "RUNNING"
            continued.log_params({"lr": 0.1})
            continued.log_metrics({"loss": 1.0}, step=2)
        with second.stage("evaluate") as other:
            pass
        assert second.flush(60)
    assert second.run_id == first.run_id
    assert continued.run_id == stage.run_id != other.run_id
    assert history(continued, "loss") == [(1, 2.0), (2, 1.0)]
    assert stored(continued).info.status == "FINISHED"
    tags = stored(second).data.tags
    assert (tags["seed"], tags["resumed.seed"], tags["note"]) == ("1", "2", "x")


def test_stage_of_another_pipeline_is_not_continued(parent: tracking.Run, folder: Path) -> None:
    another = folder.with_name("other")
    another.mkdir()
    with parent.stage("twin") as one:
        assert parent.flush(60)
    with tracking.start(another) as other, other.stage("twin") as two:
        assert other.flush(60)
    assert one.run_id != two.run_id


def test_nested_parameters_get_names_with_dots_and_urls_lose_their_user(
    parent: tracking.Run,
) -> None:
    with parent.stage("params") as run:
        run.log_params(
            {
                "data": {"root": Path("x"), "mean": [0.5, 0.25], "empty": {}},
                "teacher": None,
                "uri": "http://me:secret@host:1/x",
            }
        )
    assert stored(run).data.params == {
        "data.root": "x",
        "data.mean": "[0.5, 0.25]",
        "teacher": "None",
        "uri": "http://***@host:1/x",
    }


def test_long_parameter_is_cut_and_many_fit(parent: tracking.Run) -> None:
    with parent.stage("many params") as run:
        run.log_params({"long": "x" * 10_000} | {f"p{i}": i for i in range(250)})
    params = stored(run).data.params
    assert len(params) == 251
    assert params["long"].startswith("xxx")
    assert params["long"].endswith("…")


def test_a_parameter_that_changes_on_resume_is_reported(
    parent: tracking.Run, caplog: pytest.LogCaptureFixture
) -> None:
    with parent.stage("changed") as run:
        run.log_params({"epochs": 10, "lr": 0.1})
        run.log_params({"epochs": 20, "lr": 0.1})
    assert stored(run).data.params["epochs"] == "10"
    assert stored(run).data.tags["resumed.epochs"] == "20"
    assert "epochs was 10, is 20 now" in caplog.text


def test_of_a_long_parameter_that_changes_the_place_is_shown(
    parent: tracking.Run, caplog: pytest.LogCaptureFixture
) -> None:
    with parent.stage("changed inside") as run:
        for pretrained in ("true", "false"):
            run.log_params({"teachers": f"[{'x' * 100}, pretrained: {pretrained}, steps: 200]"})
    stored(run)  # waits until all is there
    before, _, after = caplog.text.partition(", is ")
    assert "pretrained: true, steps: 200]" in before and "pretrained: false, st" in after
    assert "x" * 50 not in caplog.text


def test_what_the_store_refuses_does_not_hold_up_what_comes_after(
    parent: tracking.Run, caplog: pytest.LogCaptureFixture
) -> None:
    with parent.stage("refused") as run:
        run.log_metrics({"a name: with \\ and ?": 1.0}, 0)
        run.log_text("x", "x.txt")
        run.log_metrics({"loss": 1.0}, 0)
    assert history(run, "loss") == [(0, 1.0)]
    assert "MLflow refuses an entry (metrics)" in caplog.text


def test_all_metrics_are_stored_when_a_stage_ends(parent: tracking.Run) -> None:
    with parent.stage("metrics") as run:
        for step in range(1500):
            run.log_metrics({"loss": torch.tensor(step / 2), "lr": 0.1}, step)
        run.log_metrics({"diverged": float("nan"), "high": float("inf")}, 0)
    assert history(run, "loss") == [(step, step / 2) for step in range(1500)]
    assert len(history(run, "lr")) == 1500
    assert str(history(run, "diverged")) == "[(0, nan)]"


def test_files_and_folders_are_stored(parent: tracking.Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("a")
    with parent.stage("artifacts") as run:
        run.log_artifact(tmp_path / "out" / "a.txt", "one")
        run.log_artifact(tmp_path / "out", "all")
    assert stored(run).info.run_id == run.run_id
    assert parent.flush(60)
    read = mlflow.MlflowClient(run.uri).download_artifacts
    assert Path(read(run.run_id, "one/a.txt")).read_text() == "a"
    assert Path(read(run.run_id, "all/a.txt")).read_text() == "a"


def test_processes_attach_and_log_at_once_without_loading_mlflow(parent: tracking.Run) -> None:
    code = """
        import sys
        from sbf_dist import tracking
        journals, rank = sys.argv[1:]
        series = tracking.attach(journals)
        for step in range(20):
            series.log_metrics({f"loss.{rank}": step}, step)
        series.flush()
        sys.exit("mlflow" in sys.modules)
        """
    with parent.stage("workers") as run, ThreadPoolExecutor(2) as pool:
        start = [str(run.journals)]
        results = list(pool.map(lambda rank: python(code, *start, str(rank)), range(2)))
        assert [(r.returncode, r.stdout, r.stderr) for r in results] == [(0, "", "")] * 2
        assert stored(run).info.status == "RUNNING"
    for rank in range(2):
        assert len(history(run, f"loss.{rank}")) == 20


def test_new_database_is_made_without_noise_by_drivers_that_start_together(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from sbf_dist import tracking
        from sbf_dist.tracking import run, store
        # One waits while the other makes the database: on a busy machine long enough for a line.
        run.START_SECONDS = run.END_SECONDS = store.SILENT_SECONDS = store.LOCK_SECONDS = 200
        Path(sys.argv[1]).mkdir(parents=True)
        tracking.start(Path(sys.argv[1])).finish()
        """
    with ThreadPoolExecutor(2) as pool:
        places = [str(tmp_path / "runs" / name) for name in ("one", "two")]
        results = list(pool.map(lambda place: python(code, place), places))
    assert [(r.returncode, r.stdout) for r in results] == [(0, "")] * 2
    for result in results:  # one may have come while the other was writing
        assert [line for line in result.stderr.splitlines() if " is locked: " not in line] == []


def test_deleted_run_is_not_continued(folder: Path) -> None:
    mine = folder.with_name("deleted")
    mine.mkdir()
    with tracking.start(mine) as run:
        pass
    mlflow.MlflowClient(run.uri).delete_run(run.run_id)
    with pytest.raises(UserError, match="was deleted"):
        tracking.start(mine)
    shutil.rmtree(mine)


def test_a_node_is_measured_under_mlflows_names(
    parent: tracking.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SECONDS", 0.05)
    with parent.stage("measured") as run:
        for worker in (1, 2):  # the second one takes the place of the first
            with tracking.measured_node(run.journals, 0):
                while len(history(run, "system/node-0/cpu_utilization_percentage")) < worker:
                    time.sleep(0.01)
    cpu = history(run, "system/node-0/cpu_utilization_percentage")
    assert [step for step, _ in cpu] == list(range(len(cpu)))
    assert len(cpu) >= 2
    assert 0 < history(run, "system/node-0/system_memory_usage_percentage")[0][1] < 100


def test_importing_the_library_does_not_load_mlflow() -> None:
    code = """
        import sys
        import sbf_dist, sbf_dist.tracking, sbf_dist.export.saved, sbf_dist.export.onnx
        sys.exit("mlflow" in sys.modules)
        """
    assert python(code).returncode == 0
