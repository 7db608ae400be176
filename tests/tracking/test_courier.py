"""A store that forgets, is cut off or has a past: nothing is lost, and nothing stands twice."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from logged_training import POINTS, train
from mlflow_double import Server
from waiting import eventually

from sbf_dist import tracking
from sbf_dist.errors import UserError
from sbf_dist.tracking import courier
from sbf_dist.tracking.state import State

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("soon_again")


def test_a_batch_that_was_taken_but_not_answered_is_not_sent_twice(
    folder: Path, double: Server
) -> None:
    with tracking.start(folder, uri=double.uri) as parent, parent.stage("distill") as stage:
        double.cut_after = 0
        train(stage, range(50))
        assert parent.flush(240)
    assert double.history("loss") == POINTS


DRIVER = """
import sys, time
from pathlib import Path
from sbf_dist import tracking
folder, uri = sys.argv[1:]
with tracking.start(Path(folder), uri=uri) as parent, parent.stage("distill") as stage:
    worker = tracking.attach(str(stage.journals))
    for step in range(0, 50, 5):
        worker.log_metrics({"loss": float(step)}, step)
    worker.flush()
    time.sleep(600)
"""


def test_a_driver_that_is_killed_between_sending_and_noting_sends_nothing_twice(
    folder: Path, double: Server
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    double.mute = True
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), str(folder), double.uri], env=environment
    )
    try:
        eventually(lambda: len(double.metrics) == len(POINTS))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    sent = json.loads((folder / "tracking.json").read_text())["sent"]
    double.mute = False
    with tracking.start(folder, uri=double.uri) as parent, parent.stage("distill") as stage:
        train(stage, range(50, 60))
    assert double.history("loss") == [*POINTS, (50, 50.0), (55, 55.0)]
    assert sent != json.loads((folder / "tracking.json").read_text())["sent"]
    assert len(double.runs) == 2


def test_steps_do_not_go_back_where_a_training_resumes_from_an_earlier_checkpoint(
    folder: Path, double: Server
) -> None:
    with tracking.start(folder, uri=double.uri) as parent, parent.stage("distill") as stage:
        train(stage, range(45))
        train(stage, range(35, 50))  # another process, from the checkpoint of step 35
    assert double.history("loss") == POINTS


def test_what_a_stage_says_again_after_a_kill_stands_once_and_what_it_says_anew_as_well(
    folder: Path, double: Server
) -> None:
    for top1 in (0.5, 0.6):  # killed before its result was kept
        with tracking.start(folder, uri=double.uri) as parent, parent.stage("evaluate") as stage:
            stage.log_metrics({"top1": top1}, 0)
            parent.log_metrics({"one/top1": top1}, parent.attempt("evaluate"))
    tracking.begin_anew(folder / "tracking.json", ["evaluate"])
    with tracking.start(folder, uri=double.uri) as parent, parent.stage("evaluate") as stage:
        stage.log_metrics({"top1": 0.7}, 0)
        parent.log_metrics({"one/top1": 0.7}, parent.attempt("evaluate"))
    assert double.history("top1") == [(0, 0.5), (0, 0.7)]
    assert double.history("one/top1") == [(0, 0.5), (1, 0.7)]


def test_a_stage_that_is_done_anew_has_a_run_of_its_own(folder: Path, double: Server) -> None:
    for _ in range(2):
        with tracking.start(folder, uri=double.uri) as parent, parent.stage("distill") as stage:
            train(stage, range(50))
        tracking.begin_anew(folder / "tracking.json", ["distill", "evaluate"])
    assert double.history("loss") == POINTS + POINTS
    assert {run["info"]["run_name"] for run in double.runs.values()} == {
        "mine",
        "distill",
        "distill-2",
    }
    with tracking.start(folder, uri=double.uri) as parent, parent.stage("evaluate"):
        assert parent.flush(240)
    assert double.status("evaluate") == "FINISHED"  # the first of its kind


def test_a_run_that_the_server_has_lost_is_told_anew(
    folder: Path, double: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with tracking.start(folder, uri=double.uri) as parent, parent.stage("distill") as stage:
        train(stage, range(25))
    double.runs.clear()
    double.metrics.clear()
    with tracking.start(folder, uri=double.uri) as again, again.stage("distill") as stage:
        train(stage, range(25, 50))
    assert again.run_id != parent.run_id
    assert double.history("loss") == POINTS
    assert f"MLflow run {parent.run_id} (run) is not in {double.uri} any more" in caplog.text


def test_a_copied_folder_has_an_mlflow_run_of_its_own_and_a_moved_one_keeps_its(
    folder: Path, double: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with tracking.start(folder, uri=double.uri) as parent, parent.stage("distill") as stage:
        train(stage, range(50))
    copy, moved = folder.with_name("copy"), folder.with_name("moved")
    shutil.copytree(folder, copy)
    with tracking.start(copy, uri=double.uri) as copied:
        pass
    assert copied.run_id != parent.run_id
    assert f"run folder {copy} is a copy of {folder}" in caplog.text
    assert double.history("loss") == POINTS + POINTS  # the copy has the history as well
    folder.rename(moved)
    with tracking.start(moved, uri=double.uri) as found:
        pass
    assert found.run_id == parent.run_id


def test_a_moved_or_copied_database_leaves_the_artifacts_of_its_original_alone(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tracking.start(folder) as parent:
        parent.log_text("old", "note.txt")
    runs = folder.parent
    shutil.copytree(runs, runs.with_name("copies"))
    (original,) = runs.glob("mlflow-artifacts/*/artifacts/note.txt")
    original.write_text("untouched")
    with tracking.start(runs.with_name("copies") / "mine") as copied:
        pass
    assert copied.run_id != parent.run_id
    assert original.read_text() == "untouched"
    new = runs.with_name("copies") / "mlflow-artifacts" / str(copied.run_id)
    assert (new / "artifacts" / "note.txt").read_text() == "old"
    assert "'sbf-dist-2'" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", '{"id": 3}', "{"])
def test_a_damaged_note_of_the_run_counts_as_none_with_a_warning(
    folder: Path, double: Server, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "tracking.json").write_text(content)
    with tracking.start(folder, uri=double.uri) as parent:
        pass
    assert f"{folder}/tracking.json is damaged" in caplog.messages[0]
    assert json.loads((folder / "tracking.json").read_text())["run_id"] == parent.run_id


def test_a_lost_note_of_the_run_is_replaced_by_what_checkpoints_name(
    folder: Path, double: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with tracking.start(folder, uri=double.uri) as parent, parent.stage("distill") as stage:
        stage.log_metrics({"loss": 2.0}, step=1)
    note = folder / "tracking.json"
    tracking.recover(note, lambda: pytest.fail("the note is whole"))
    note.unlink()
    tracking.recover(note, lambda: None)  # of a version that did not name it
    assert not note.exists()
    tracking.recover(note, lambda: parent.run_id)
    assert f"{note} was lost: continuing MLflow run {parent.run_id}, which" in caplog.messages[-1]
    assert json.loads(note.read_text())["recovered"]
    with tracking.start(folder, uri=double.uri) as again, again.stage("distill") as continued:
        continued.log_metrics({"loss": 1.0}, step=2)
    assert (again.run_id, continued.run_id) == (parent.run_id, stage.run_id)
    assert double.history("loss") == [(1, 2.0), (2, 1.0)]
    assert "recovered" not in json.loads(note.read_text())


def test_a_deleted_run_that_checkpoints_name_is_not_gone_on_with(
    folder: Path, double: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with tracking.start(folder, uri=double.uri) as parent:
        pass
    double.runs[parent.run_id]["info"]["lifecycle_stage"] = "deleted"
    (folder / "tracking.json").unlink()
    tracking.recover(folder / "tracking.json", lambda: parent.run_id)
    with tracking.start(folder, uri=double.uri) as again:
        assert again.flush(10)
    assert again.run_id not in (None, parent.run_id)
    assert f"MLflow run {parent.run_id} (run) is not in" in caplog.text


def test_journals_tell_how_often_a_stage_was_begun_anew(folder: Path, double: Server) -> None:
    for name in ("distill", "distill-2", "distill-3", "evaluate", "distill-round-1"):
        (folder / "tracking" / name).mkdir(parents=True)
    with tracking.start(folder, uri=double.uri) as run:
        assert [run.attempt(stage) for stage in ("distill", "evaluate")] == [2, 0]


def test_the_run_of_an_earlier_version_is_continued(folder: Path, double: Server) -> None:
    with tracking.start(folder, uri=double.uri) as parent, parent.stage("distill") as stage:
        pass
    before = {"uri": double.uri, "run_id": parent.run_id}
    (folder / "tracking.json").write_text(json.dumps(before))
    shutil.rmtree(folder / "tracking")
    with tracking.start(folder, uri=double.uri) as again, again.stage("distill") as continued:
        pass
    assert (again.run_id, continued.run_id) == (parent.run_id, stage.run_id)


def test_a_line_that_a_full_disk_has_cut_is_left_out_and_the_next_ones_are_not(
    folder: Path, double: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with tracking.start(folder, uri=double.uri) as parent, parent.stage("distill") as stage:
        worker = tracking.attach(str(stage.journals))
        worker.log_metrics({"loss": 0.0}, 0)
        with worker._journal.path.open("a") as file:
            file.write('{"kind": "metr\n')
        worker.log_metrics({"loss": 5.0}, 5)
        assert parent.flush(240)
    assert double.history("loss") == POINTS[:2]
    assert "refuses an entry (damaged)" in caplog.text


def test_a_disk_that_cannot_be_written_loses_metrics_with_one_warning_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "distill").write_text("a file where a folder should be")
    worker = tracking.attach(str(tmp_path / "distill"))
    worker.log_metrics({"loss": 1.0}, 1)
    worker.log_metrics({"loss": 1.0}, 2)
    (warning,) = caplog.messages
    assert "metrics are lost" in warning
    assert str(tmp_path / "distill") in warning


SECRET = "pass%20word-4711"


@pytest.mark.usefixtures("impatient")
def test_a_password_in_the_uri_works_and_is_in_no_file_and_no_message(
    folder: Path, double: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    double.credentials = "me:pass word-4711"
    uri = double.uri.replace("http://", f"http://me:{SECRET}@")
    with tracking.start(folder, uri=uri) as parent, parent.stage("distill") as stage:
        stage.log_params({"tracking": {"uri": uri}})
        train(stage, range(50))
        assert parent.flush(240)
        double.stop()
        train(stage, range(50, 60))
    assert double.history("loss") == POINTS
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    assert len(files) > 3
    texts = [path.read_text(errors="replace") for path in files]
    texts += [caplog.text, parent.uri, repr(parent), json.dumps(double.runs)]
    for text in texts:
        assert "4711" not in text
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "pass word-4711"


def test_wrong_credentials_are_the_users_mistake(folder: Path, double: Server) -> None:
    double.credentials = "me:right"
    with pytest.raises(UserError, match="refuses the credentials") as caught:
        tracking.start(folder, uri=double.uri.replace("http://", "http://me:wr0ng@"))
    assert "wr0ng" not in str(caught.value)


@pytest.mark.usefixtures("impatient")
def test_only_what_is_kept_elsewhere_too_is_delivered(folder: Path, double: Server) -> None:
    """As a run in an object store asks for: a driver elsewhere must know what was delivered."""
    sizes: dict[Path, int] = {}

    def keep() -> None:
        sizes.update({path: path.stat().st_size for path in folder.rglob("*.jsonl")})

    with tracking.start(folder, uri=double.uri, kept=lambda path: sizes.get(path, 0)) as parent:
        with parent.stage("distill") as stage:
            worker = tracking.attach(str(stage.journals))
            train(stage, range(25), worker)
            assert not parent.flush(0.3)
            assert double.metrics == []
            keep()
            train(stage, range(25, 50), worker)
            eventually(lambda: double.history("loss") == POINTS[:5])
            assert not parent.flush(0.3)
            keep()
            assert parent.flush(240)
            assert double.history("loss") == POINTS
        keep()


def test_a_state_that_is_behind_by_many_requests_doubles_nothing(
    folder: Path, double: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a driver that is gone, with its machine, may not have been stored in time."""
    monkeypatch.setattr(courier, "MAX_REQUEST_METRICS", 2)
    with tracking.start(folder, uri=double.uri) as parent, parent.stage("distill") as stage:
        train(stage, range(0))
        assert parent.flush(240)
        before = (folder / "tracking.json").read_text()
        train(stage, range(50))
    (folder / "tracking.json").write_text(before)
    with tracking.start(folder, uri=double.uri) as parent:
        assert parent.flush(240)
    assert double.history("loss") == POINTS


def test_copies_of_a_run_in_an_object_store_are_one_run(
    folder: Path, double: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with tracking.start(folder, uri=double.uri, address="s3://bucket/runs/mine") as first:
        assert first.flush(240)
    other = folder.parents[1] / "other machine" / "mine"
    shutil.copytree(folder, other)
    with tracking.start(other, uri=double.uri, address="s3://bucket/runs/mine") as second:
        assert second.flush(240)
        assert second.run_id == first.run_id
    assert not caplog.messages


def test_a_full_disk_of_the_run_is_one_line_and_metrics_come_once_there_is_room(
    folder: Path, double: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, full = State.save, OSError(errno.ENOSPC, "No space left on device")

    def fail(state: State) -> None:
        raise full

    with tracking.start(folder, uri=double.uri) as parent, parent.stage("distill") as stage:
        assert parent.flush(240)
        monkeypatch.setattr(State, "save", fail)
        train(stage, range(50))
        eventually(lambda: caplog.messages)
        monkeypatch.setattr(State, "save", save)
        assert parent.flush(240)
    assert caplog.messages[0] == f"metrics wait in {folder / 'tracking'}: {full}"
    assert all(record.exc_info is None for record in caplog.records)
    assert double.history("loss") == POINTS
