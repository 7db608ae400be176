import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from launchers.on_ray import temporary_folder as module
from launchers.on_ray.temporary_folder import temporary_folder

HOLDER = """
import sys, time
from launchers.on_ray.temporary_folder import temporary_folder
with temporary_folder() as folder:
    print(folder, flush=True)
    time.sleep(600)
"""
RAYS_PATH = "r/session_2026-11-26_22-10-37_123456_1234567/sockets/plasma_store"


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of this test's own with a short name, as TMPDIR."""
    folder = Path(tempfile.mkdtemp(prefix="b", dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def holder() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_it_is_this_users_alone_short_enough_for_rays_sockets_and_removed(base: Path) -> None:
    with temporary_folder() as folder:
        assert folder.parent == base
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert len(str(folder / RAYS_PATH)) <= 107
    assert list(base.iterdir()) == []


def test_a_long_tmpdir_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder() as folder:
        assert folder.parent == Path("/tmp")


def test_that_of_a_living_process_stays_and_that_of_a_killed_one_goes(base: Path) -> None:
    process, theirs = holder()
    with temporary_folder():
        assert theirs.exists()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert theirs.exists()
    with temporary_folder():
        assert not theirs.exists()


def test_links_files_and_folders_of_other_users_are_left_alone(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = base / "outside"
    outside.mkdir()
    (base / "sbf-run-dangling").symlink_to(base / "nothing")
    (base / "sbf-run-link").symlink_to(outside)
    (base / "sbf-run-file").touch()
    before = sorted(base.iterdir())
    with temporary_folder():
        pass
    assert sorted(base.iterdir()) == before
    theirs = base / "sbf-run-theirs"
    theirs.mkdir()
    monkeypatch.setattr(module.os, "geteuid", lambda: os.getuid() + 1)
    with temporary_folder():
        assert theirs.exists()


def test_two_starts_at_once_do_not_take_each_others_folder(base: Path) -> None:
    """Each start looks for left-overs while the other makes its own, many times over."""
    lost: list[Path] = []

    def start() -> None:
        for _ in range(100):
            with temporary_folder() as folder:
                if not folder.exists():
                    lost.append(folder)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lost == []
    assert list(base.iterdir()) == []


def test_a_folder_that_is_taken_between_making_and_locking_is_made_anew(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    plain = tempfile.mkdtemp

    def make_and_lose_the_first(**options: str) -> str:
        made.append(Path(plain(**options)))
        if len(made) == 1:
            module._remove_if_left_over(made[0])
        return str(made[-1])

    monkeypatch.setattr(module.tempfile, "mkdtemp", make_and_lose_the_first)
    with temporary_folder() as folder:
        assert folder == made[1]
        assert folder.exists()
