"""An SQLite database of MLflow's, whose tables are made or brought up to date as a whole.

MLflow makes them in hundreds of steps, each of which stays: a kill in between leaves a database
that no MLflow can continue. So the steps are done on a copy, which then takes the place of what was
there in one transaction of SQLite's own.
"""

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sbf_dist.tracking import database_lock

if TYPE_CHECKING:
    from sqlalchemy import Engine

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
QUIET_SECONDS = 10.0  # for which nobody has written to a database that is taken for unfinished
_ENDINGS = ("", "-journal", "-wal", "-shm")  # of the files that SQLite keeps for a database


def make_whole(database: Path) -> None:
    """Give an SQLite database the tables that this MLflow needs; a kill leaves it as it was.

    The caller holds its lock (see `alone`). A database whose making was interrupted, by another
    program or an earlier version of this one, has nothing in it: it is set aside, with a warning.
    One of another MLflow that has all tables is left to this MLflow, which says what to do.

    sqlite3.Error, or what MLflow and SQLAlchemy raise, where it cannot be done.
    """
    if database.exists():
        if _has_newest_schema(database):
            return
        if _is_unfinished(database):
            if _is_finished_by_others(database):
                return
            _set_aside(database)
        elif _has_all_tables(database):
            return
    copy = database.with_name(f".{database.name}.partial")
    _remove(copy)  # of a kill
    try:
        _make(database, copy)
    finally:
        _remove(copy)


def _make(database: Path, copy: Path) -> None:
    from mlflow.store.db import utils

    with (
        contextlib.closing(_connected(database)) as original,
        contextlib.closing(_connected(copy)) as partial,
    ):
        with _held(database):  # what others would write meanwhile would be lost
            _copy(original, partial)
            with _engine(copy) as engine:
                utils._initialize_tables(engine)
        _copy(partial, original)


@contextlib.contextmanager
def _held(database: Path) -> Iterator[None]:
    """Let others read a database, but not write to it."""
    with contextlib.closing(_connected(database)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def _copy(source: sqlite3.Connection, target: sqlite3.Connection) -> None:
    """Make one database the same as another, at once; Python alone would wait for ever for it."""
    deadline = time.monotonic() + database_lock.LOCK_SECONDS

    def check(status: int, left: int, pages: int) -> None:
        if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) and time.monotonic() > deadline:
            raise TimeoutError("the database is locked by another process")

    source.backup(target, progress=check)


def _has_all_tables(database: Path) -> bool:
    from mlflow.store.db import utils

    with _engine(database) as engine:
        return bool(utils._all_tables_exist(engine))


def _has_newest_schema(database: Path) -> bool:
    from mlflow.store.db import utils

    with _engine(database) as engine:
        newest = utils._get_latest_schema_revision()
        return bool(utils._get_schema_version(engine) == newest and utils._all_tables_exist(engine))


def _is_unfinished(database: Path) -> bool:
    """Whether MLflow has not entered its first experiment, which it does once it has all tables."""
    with contextlib.closing(_connected(database)) as connection:
        named = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'experiments'"
        if connection.execute(named).fetchone() is None:
            return False
        return connection.execute("SELECT 1 FROM experiments").fetchone() is None


def _is_finished_by_others(database: Path) -> bool:
    """Wait until nobody is at work on an unfinished database, which MLflow does not lock."""
    deadline = time.monotonic() + database_lock.LOCK_SECONDS
    while time.time() - database.stat().st_mtime < QUIET_SECONDS:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{database} is being made by another process")
        time.sleep(0.5)
    return _has_newest_schema(database)


def _set_aside(database: Path) -> None:
    aside = database.with_name(database.name + UNFINISHED)
    number = 1
    while aside.exists():
        number += 1
        aside = database.with_name(f"{database.name}{UNFINISHED}-{number}")
    for ending in reversed(_ENDINGS):  # a journal must not be found beside another database
        with contextlib.suppress(FileNotFoundError):
            database.with_name(database.name + ending).rename(f"{aside}{ending}")
    logger.warning(
        "%s: its making was interrupted, and nothing is in it; renamed to %s, and made anew",
        database,
        aside.name,
    )


def _connected(database: Path) -> sqlite3.Connection:
    """Return a connection without transactions but those that are written."""
    return sqlite3.connect(database, timeout=database_lock.LOCK_SECONDS, isolation_level=None)


@contextlib.contextmanager
def _engine(database: Path) -> Iterator["Engine"]:
    from mlflow.store.db import utils

    engine = utils.create_sqlalchemy_engine(f"sqlite:///{database}")
    try:
        yield engine
    finally:
        engine.dispose()


def _remove(database: Path) -> None:
    for ending in _ENDINGS:
        database.with_name(database.name + ending).unlink(missing_ok=True)
