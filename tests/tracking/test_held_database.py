"""An SQLite database that somebody else holds: waited for a shown time, and never in the way."""

import fcntl
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from logged_training import train
from waiting import eventually

from sbf_dist import tracking
from sbf_dist.tracking import database_lock

pytestmark = pytest.mark.usefixtures("soon_again")


def test_a_held_lock_of_a_database_is_waited_for_a_shown_time_and_then_it_is_away(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, sleep=lambda _: pass_by())

    def pass_by() -> None:
        time.sleep(0.01)
        clock.now += 30

    monkeypatch.setattr(database_lock, "time", clock)
    lock = folder.parent / "mlflow.db.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        parent = tracking.start(folder)
        assert f"{lock} is locked by another process: waiting 15 s" in caplog.text
        assert parent.run_id is None
    with parent:
        eventually(lambda: parent.run_id is not None)


def test_a_locked_database_does_not_hold_up_a_run(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_lock, "LOCK_SECONDS", 0.6)
    with tracking.start(folder):
        pass
    database = sqlite3.connect(folder.parent / "mlflow.db", isolation_level=None)
    database.execute("BEGIN EXCLUSIVE")
    with tracking.start(folder) as parent, parent.stage("distill") as stage:
        train(stage, range(50))
        assert "mlflow.db is locked: waiting" in caplog.text
        assert "database is locked" in caplog.text
        database.execute("ROLLBACK")
        database.close()
        assert parent.flush(240)
    assert stage.run_id is not None
