"""An SQLite database that is made or brought up to date: as a whole, or not at all."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from mlflow.store.db import utils
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase
from waiting import eventually

from sbf_dist import tracking
from sbf_dist.tracking.database import QUIET_SECONDS, make_whole
from sbf_dist.tracking.store import quiet_mlflow

ROOT = Path(__file__).parents[2]
HALF = 150_000  # bytes of a database that is about half made
OLD = "4465047574b1"  # of the schema of MLflow 2.17, which lacks tables

DRIVER = """
import sys
from pathlib import Path
from sbf_dist import tracking
tracking.start(Path(sys.argv[1]))
"""


@contextmanager
def opened(database: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(database)) as connection, connection:
        yield connection


def schema(database: Path) -> tuple[str, int]:
    """The revision of a database, and how many tables it has."""
    with opened(database) as connection:
        (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        count = "SELECT count(*) FROM sqlite_master WHERE type = 'table'"
        return revision, connection.execute(count).fetchone()[0]


def content(database: Path) -> list[str]:
    with opened(database) as connection:
        return list(connection.iterdump())


def enter_experiment(database: Path) -> None:
    with opened(database) as connection:
        connection.execute(
            "INSERT INTO experiments (name, lifecycle_stage) VALUES ('mine', 'active')"
        )


def experiments(database: Path) -> list[str]:
    with opened(database) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM experiments")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quiet_mlflow()
    database = tmp_path_factory.mktemp("made") / "mlflow.db"
    make_whole(database)
    return database


@pytest.fixture
def database(made: Path, tmp_path: Path) -> Path:
    """A copy of one that is made, and in which nothing is yet."""
    return Path(shutil.copy(made, tmp_path / "mlflow.db"))


@pytest.mark.usefixtures("soon_again")
def test_a_kill_while_it_is_made_does_not_keep_later_runs_from_it(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def is_half_made() -> bool:
        found = folder.parent.glob("*mlflow.db*")
        return any(path.stat().st_size > HALF for path in found if path.exists())

    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        eventually(is_half_made)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with tracking.start(folder) as parent:
        assert parent.run_id is not None
    assert caplog.messages == []
    assert sorted(path.name for path in folder.parent.glob("*.db*")) == [
        "mlflow.db",
        "mlflow.db.lock",
    ]


def test_one_whose_making_was_interrupted_is_set_aside(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = schema(database)
    for number in ("", "-2"):
        with opened(database) as connection:
            connection.execute(f"UPDATE alembic_version SET version_num = '{OLD}'")
        unfinished = content(database)
        long_ago = database.stat().st_mtime - 2 * QUIET_SECONDS
        os.utime(database, (long_ago, long_ago))
        make_whole(database)
        assert schema(database) == whole
        assert content(database.with_name(f"mlflow.db.unfinished{number}")) == unfinished
    assert f"{database}: its making was interrupted, and nothing is in it" in caplog.text


def test_one_of_an_older_version_is_brought_up_to_date_as_a_whole_or_left(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic import command

    database = tmp_path / "old.db"
    engine = utils.create_sqlalchemy_engine(f"sqlite:///{database}")
    InitialBase.metadata.create_all(engine)
    command.upgrade(utils._get_alembic_config(str(engine.url)), OLD)
    engine.dispose()
    enter_experiment(database)
    before, initialize = content(database), utils._initialize_tables

    def break_down(engine: object) -> None:
        initialize(engine)
        raise OSError("no space left")

    monkeypatch.setattr(utils, "_initialize_tables", break_down)
    with pytest.raises(OSError, match="no space left"):
        make_whole(database)
    assert content(database) == before
    monkeypatch.setattr(utils, "_initialize_tables", initialize)
    make_whole(database)
    assert schema(database) == schema(made)
    assert experiments(database) == ["mine"]


def test_one_of_another_version_that_has_all_tables_is_left_to_mlflow(database: Path) -> None:
    enter_experiment(database)
    with opened(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'newer'")
    before = content(database)
    make_whole(database)
    assert content(database) == before
