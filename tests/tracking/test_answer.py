"""Whether a tracking store answers, asked without changing it."""

from pathlib import Path

import pytest
from mlflow_double import server

from sbf_dist.tracking import tracking_address
from sbf_dist.tracking.answer import refusal


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_database_is_read_and_not_made(tmp_path: Path) -> None:
    assert refusal(tracking_address(tmp_path)) is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mlflow.db").write_bytes(b"no database, but long enough to be taken for one")
    assert "file is not a database" in str(refusal(tracking_address(tmp_path)))


def test_a_server_answers_until_it_is_away(tmp_path: Path) -> None:
    with server() as double:
        address = tracking_address(tmp_path, double.uri)
        assert refusal(address) is None
        double.stop()
        assert "refused" in str(refusal(address))
