"""A tracking store that is away: nothing waits for it, and it gets everything later."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from logged_training import POINTS, train
from mlflow_double import Server
from waiting import eventually

from sbf_dist import tracking
from sbf_dist.tracking import courier, run
from sbf_dist.tracking.store import MlflowStore

pytestmark = pytest.mark.usefixtures("soon_again")


def test_a_server_that_is_away_at_the_start_gets_everything_once_it_answers(
    folder: Path, double: Server, caplog: pytest.LogCaptureFixture
) -> None:
    double.stop()
    with tracking.start(folder, uri=double.uri, tags={"seed": 3}) as parent:
        assert parent.run_id is None
        ours = [r for r in caplog.records if r.name.startswith("sbf_dist.tracking")]
        (warning,) = (record.getMessage() for record in ours)
        assert "does not answer" in warning
        assert "\n" not in warning
        with parent.stage("distill") as stage:
            stage.log_params({"lr": 0.1})
            train(stage, range(50))
        double.start()
        eventually(lambda: len(double.metrics) == len(POINTS))
    assert double.history("loss") == POINTS
    assert double.tags("mine")["seed"] == "3"
    assert (double.status("mine"), double.status("distill")) == ("FINISHED", "FINISHED")
    assert double.tags("distill")["mlflow.parentRunId"] == parent.run_id


def test_a_server_that_goes_in_the_middle_is_warned_of_once_and_gets_the_rest_later(
    folder: Path,
    double: Server,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries = 0
    connect = MlflowStore.connect

    def counted(self: MlflowStore) -> None:
        nonlocal tries
        tries += 1
        connect(self)

    monkeypatch.setattr(MlflowStore, "connect", counted)
    with tracking.start(folder, uri=double.uri) as parent, parent.stage("distill") as stage:
        worker = tracking.attach(str(stage.journals))
        train(stage, range(25), worker)
        assert parent.flush()
        double.stop()
        train(stage, range(25, 50), worker)
        eventually(lambda: tries >= 4)  # the first one found it there
        assert len(caplog.messages) == 1
        double.start()
        eventually(lambda: len(caplog.messages) == 2)  # of a closed courier nothing is heard
    assert double.history("loss") == POINTS
    assert caplog.messages[1].endswith("answers again")


def test_what_a_run_could_not_deliver_waits_a_bounded_time_and_comes_with_the_next_start(
    folder: Path,
    double: Server,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tracking.start(folder, uri=double.uri) as parent, parent.stage("distill") as stage:
        train(stage, range(25))
        assert parent.flush()
        double.stop()
        train(stage, range(25, 50))
        monkeypatch.setattr(run, "END_SECONDS", 0.5)
        start = time.monotonic()
    assert time.monotonic() - start < 120
    assert f"5 metrics and 2 other entries are kept in {folder}/tracking" in caplog.messages[-1]
    assert "next start" in caplog.messages[-1]
    monkeypatch.setattr(run, "END_SECONDS", 240)
    double.start()
    with tracking.start(folder, uri=double.uri) as again:
        assert again.run_id == parent.run_id
    assert double.history("loss") == POINTS


def test_artifacts_that_cannot_be_stored_hold_up_no_metrics(
    folder: Path,
    double: Server,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    all_else = "0 metrics and 1 other entries"
    skipped = 0.0

    def now() -> float:
        """The end of the run waits for long, but only until the store has all else."""
        nonlocal skipped
        if ending is not None and ending._courier.waiting() == all_else:
            skipped += 100
        return time.monotonic() + skipped

    ending: tracking.Run | None = None
    monkeypatch.setattr(courier, "time", SimpleNamespace(monotonic=now))
    double.artifacts = None
    with tracking.start(folder, uri=double.uri) as parent, parent.stage("distill") as stage:
        stage.log_text("hello", "note.txt")
        train(stage, range(50))
        ending = parent
    assert double.history("loss") == POINTS
    assert f"{all_else} are kept" in caplog.messages[-1]
    ending = None
    double.artifacts = {}
    with tracking.start(folder, uri=double.uri):
        pass
    assert list(double.artifacts.values()) == [b"hello"]


def test_a_server_that_hangs_holds_up_neither_the_start_nor_the_end(
    folder: Path, double: Server, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    monkeypatch.setattr(run, "START_SECONDS", 0.3)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    double.silent = 600
    start = time.monotonic()
    with tracking.start(folder, uri=double.uri) as parent, parent.stage("distill") as stage:
        train(stage, range(50))
    assert time.monotonic() - start < 240
    assert double.requests == 1


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_mlflows_own_server_is_killed_in_the_middle_and_misses_nothing(
    folder: Path, tmp_path: Path
) -> None:
    port = free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{tmp_path}/server.db"),
        *("--artifacts-destination", str(tmp_path / "artifacts")),
    ]

    def serve() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )

    def kill(process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    process = serve()
    try:
        # A slow machine: the run begins while the server does.
        parent = tracking.start(folder, uri=f"http://127.0.0.1:{port}")
        with parent, parent.stage("distill") as stage:
            worker = tracking.attach(str(stage.journals))
            train(stage, range(25), worker)
            assert parent.flush(240)
            kill(process)
            train(stage, range(25, 50), worker)
            stage.log_text("hello", "note.txt")
            time.sleep(1)
            process = serve()
        import mlflow

        client = mlflow.MlflowClient(f"http://127.0.0.1:{port}")
        history = client.get_metric_history(str(stage.run_id), "loss")
        assert [(m.step, m.value) for m in history] == POINTS
        assert client.get_run(str(parent.run_id)).info.status == "FINISHED"
        assert len(list((tmp_path / "artifacts").rglob("note.txt"))) == 1
    finally:
        kill(process)
