import os
from pathlib import Path

import pytest

from launchers.on_ray import kept_logs
from launchers.on_ray.failures import AttemptError
from launchers.on_ray.kept_logs import keep_logs

FAILURE = AttemptError(lost=True, cause="worker 1 died", details="Traceback …\nKeyError: 'x'")


def test_what_is_known_of_a_failure_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rays, kept = tmp_path / "ray", tmp_path / "logs"
    (rays / "train").mkdir(parents=True)
    kept.mkdir()
    monkeypatch.setattr(kept_logs.local_ray, "logs", lambda: rays)
    (rays / "worker-1.err").write_text("Segmentation fault\n")
    (rays / "worker-2.err").write_text("")
    (rays / "worker-3.out").write_text("of an attempt before")
    os.utime(rays / "worker-3.out", (100, 100))
    (kept / "teacher-rank-0-stacks.txt").write_text("Timeout! in all_reduce")
    (kept / "teacher-rank-1-stacks.txt").write_text("")

    first = keep_logs(kept, "teachers", FAILURE, since=200)

    assert first == kept / "teachers-1.log"
    assert first.read_text() == (
        "Traceback …\nKeyError: 'x'\n"
        "--- teacher-rank-0-stacks.txt\nTimeout! in all_reduce\n"
        "--- worker-1.err\nSegmentation fault\n"
    )
    assert list(kept.iterdir()) == [first]
    assert keep_logs(kept, "teachers", FAILURE, since=200).name == "teachers-2.log"


def test_where_ray_is_a_clusters_the_error_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_logs.local_ray, "logs", lambda: None)
    assert keep_logs(tmp_path / "new", "distill", FAILURE, 0).read_text().endswith("'x'\n")
