"""A disk that takes no more while workers train: what is said of it is the first cause."""

import errno
from pathlib import Path
from typing import Any

import pytest

from launchers.on_ray import ray_train, worker_group
from launchers.on_ray.printed import Printed
from sbf_dist.errors import UserError

FULL = OSError(errno.ENOSPC, "No space left on device")


def test_an_error_is_not_replaced_by_one_of_showing_the_last_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_train, "_internal_kv_list", lambda *_, **__: [])
    monkeypatch.setattr(ray_train, "_internal_kv_get", lambda *_, **__: b"{}")

    def show(record: dict[str, Any]) -> None:
        raise FULL

    def say(line: str) -> None:
        pass

    with pytest.raises(UserError, match="the cause") as caught, ray_train.watch("key", show, say):
        raise UserError("the cause")
    (note,) = caught.value.__notes__
    assert "No space left" in note
    with pytest.raises(OSError, match="No space left"), ray_train.watch("key", show, say):
        pass


def test_a_workers_full_disk_arrives_as_it_was_and_is_not_tried_again() -> None:
    from ray.train import WorkerGroupError

    failures = {0: RuntimeError("Connection closed by peer"), 1: FULL}
    assert worker_group._cause(WorkerGroupError("two", failures)) is FULL


def test_what_workers_print_is_kept_once_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logs, kept = tmp_path / "ray", tmp_path / "run" / "workers.log"
    logs.mkdir()
    (logs / "worker-1.err").write_text("one\n")
    kept.mkdir(parents=True)  # it cannot be written
    printed = Printed(kept)
    printed.take(logs)
    printed.take(logs)
    (message,) = caplog.messages
    assert message.startswith(f"what workers print is not kept: {kept}: ")
    kept.rmdir()
    (logs / "worker-1.err").write_text("one\ntwo\n")
    printed.take(logs)
    assert kept.read_text() == "--- worker-1.err\none\ntwo\n"
