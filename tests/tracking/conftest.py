from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_double import Server, server

from sbf_dist.tracking import courier, run


@pytest.fixture
def double() -> Iterator[Server]:
    with server() as found:
        yield found


@pytest.fixture
def soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Couriers that look and try again soon, and have all the time that there is."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(courier, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(courier, "_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(courier, "_WAITING_RETRY_SECONDS", 0.05)
    for name in ("START_SECONDS", "END_SECONDS", "INTERRUPTED_SECONDS"):
        monkeypatch.setattr(run, name, 240.0)


@pytest.fixture
def impatient(soon_again: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a run waits hardly at all for a store that is silent."""
    monkeypatch.setattr(run, "END_SECONDS", 0.5)
    monkeypatch.setattr(run, "INTERRUPTED_SECONDS", 0.3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run."""
    found = tmp_path / "runs" / "mine"
    found.mkdir(parents=True)
    return found
