"""The copy of the tracking database, in a double of S3 on this machine."""

import sqlite3
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from launchers.nodes.mlflow_database import restore, save


def rows(database) -> list[int]:
    with closing(sqlite3.connect(database)) as connection:
        return [value for (value,) in connection.execute("select value from metrics")]


def test_a_database_in_use_is_copied_and_comes_back_on_another_machine(s3, tmp_path):
    uri = f"{s3.bucket}/mlflow/mlflow.db"
    database, other = tmp_path / "mlflow.db", tmp_path / "new machine" / "mlflow.db"
    assert not restore(other, uri)  # the very first machine
    assert not save(other, uri)
    assert not other.exists()
    with closing(sqlite3.connect(database)) as server:
        server.execute("pragma journal_mode=wal")  # rows that are not in the file itself yet
        server.execute("create table metrics (value)")
        server.execute("insert into metrics values (1)")
        server.commit()
        server.execute("insert into metrics values (2)")  # which nobody has committed
        assert save(database, uri)
    assert restore(other, uri)
    assert rows(other) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db", "new machine"]


def test_a_database_that_is_there_is_never_replaced(s3, tmp_path):
    uri = f"{s3.bucket}/mlflow.db"
    database = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(database)) as server:
        server.execute("create table metrics (value)")
        server.commit()
        assert save(database, uri)
        server.execute("insert into metrics values (1)")
        server.commit()
    assert not restore(database, uri)
    assert rows(database) == [1]


def test_a_store_that_refuses_is_an_error_so_that_no_server_starts_empty(s3, tmp_path, monkeypatch):
    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(403)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()

    database = tmp_path / "mlflow.db"
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(OSError, match=r"ACCESS_DENIED|403"):
            restore(database, f"{s3.bucket}/mlflow.db")
        server.shutdown()
    assert not database.exists()
