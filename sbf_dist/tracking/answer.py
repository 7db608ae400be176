"""Whether a tracking store answers, asked without changing it."""

import contextlib
import sqlite3
from pathlib import Path

from sbf_dist.tracking.address import DATABASES, Address
from sbf_dist.tracking.store import cause_of, quiet_mlflow


def refusal(address: Address) -> str | None:
    """Return why a store does not answer, in one line without what is secret; None if it does.

    An SQLite database that is not there yet answers: the first run makes it.
    """
    database = address.database_file
    try:
        if database is not None:
            _read(database)
        elif address.scheme in DATABASES:
            _connect(address.uri)
        else:
            _ask(address)
    except Exception as error:  # of MLflow and of any database's driver
        return address.hide(cause_of(str(error))) or type(error).__name__
    return None


def _read(database: Path) -> None:
    if not database.exists():
        return
    uri = f"{database.resolve().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5)) as connection:
        connection.execute("SELECT count(*) FROM experiments").fetchone()


def _connect(uri: str) -> None:
    import sqlalchemy

    sqlalchemy.create_engine(uri).connect().close()


def _ask(address: Address) -> None:
    address.enter_credentials()
    mlflow = quiet_mlflow()
    mlflow.MlflowClient(tracking_uri=address.uri).search_experiments(max_results=1)
