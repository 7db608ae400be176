"""An SQLite database of MLflow's: one process at a time creates or migrates it."""

import contextlib
import fcntl
import logging
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from sbf_dist.errors import UserError
from sbf_dist.tracking.address import Address

logger = logging.getLogger(__name__)

LOCK_SECONDS = 45.0  # for which a lock of an SQLite database is waited for
SILENT_SECONDS = 20.0  # of it, before a line says so: another run may be making the database


@contextlib.contextmanager
def alone(address: Address) -> Iterator[None]:
    """Hold the lock of an SQLite database; other stores have none.

    UserError for a place that cannot be written. TimeoutError or sqlite3.OperationalError where
    another process holds the lock or the database for LOCK_SECONDS.
    """
    database = address.database_file
    if database is None:
        yield
        return
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        lock = database.with_name(database.name + ".lock").open("w")
    except OSError as error:
        raise UserError(f"tracking store {address.shown}: {error}") from error
    with lock:
        _wait_for_lock(lock.fileno(), lock.name)
        _wait_for_database(database)
        yield


def _wait_for_lock(descriptor: int, name: str) -> None:
    start = time.monotonic()
    said = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited = time.monotonic() - start
            if waited > LOCK_SECONDS:
                raise TimeoutError(f"{name} is locked by another process") from None
        if not said and waited > SILENT_SECONDS:
            left = LOCK_SECONDS - waited
            logger.warning("%s is locked by another process: waiting %.0f s", name, left)
            said = True
        time.sleep(0.1)


def _wait_for_database(database: Path) -> None:
    """Wait until nobody holds a database locked: MLflow would try for minutes."""
    if not database.exists():
        return
    with contextlib.closing(sqlite3.connect(database, timeout=0)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            logger.warning("%s is locked: waiting %.0f s", database, LOCK_SECONDS)
            connection.execute(f"PRAGMA busy_timeout = {int(LOCK_SECONDS * 1000)}")
            connection.execute("BEGIN IMMEDIATE")
        connection.rollback()
