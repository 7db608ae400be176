"""Checkpoints written while a training goes on, disks that fill up, ends and hangs: without Ray."""

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from launchers.on_ray import saving as module
from launchers.on_ray import stopping
from launchers.on_ray.checkpoints import Shelf
from launchers.on_ray.failures import StoppedError
from launchers.on_ray.saving import Saving
from launchers.on_ray.stopping import Stopping
from sbf_dist.errors import UserError
from sbf_dist.train import checkpoint
from sbf_dist.train.manifest import read_manifest

DIGESTS = {"training": "student"}


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone; the engine's files are two small ones."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(module.checkpoint, "write_rank", write_rank)
    monkeypatch.setattr(module.checkpoint, "verify", read_manifest)
    yield
    dist.destroy_process_group()


def write_rank(engine: Any, own: Path, *, loader_state: dict[str, Any]) -> None:
    (own / "ranks").mkdir(parents=True)
    (own / "ranks" / "00000.json").write_text(json.dumps(loader_state))
    (own / "shard.pt").write_bytes(bytes(engine))


def opened(folder: Path, asked: Callable[[], bool] = lambda: False) -> Saving:
    stopping = Stopping(nullcontext(asked), 60, folder / "stacks.txt")
    return Saving(Shelf(folder / "shelf", "student", mlflow_run="1a"), stopping)


def save(saving: Saving, step: int, size: int = 100) -> None:
    saving.save(size, step=step, loader_state={"step": step}, digests=DIGESTS)


def steps(folder: Path) -> list[int]:
    names = Shelf(folder / "shelf", "student").names()
    return sorted(int(name.rpartition("-")[2]) for name in names)


def test_a_training_goes_on_while_its_checkpoint_is_written_and_the_next_one_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go, started = threading.Event(), threading.Event()
    plain = checkpoint.publish

    def slowly(*arguments: Any, **options: Any) -> None:
        started.set()
        assert let_go.wait(240)
        plain(*arguments, **options)

    monkeypatch.setattr(module.checkpoint, "publish", slowly)
    with opened(tmp_path) as saving:
        save(saving, 10)  # it returns, although nothing is published
        assert started.wait(120)
        assert steps(tmp_path) == []
        second = threading.Thread(target=save, args=[saving, 20])
        second.start()
        second.join(0.2)
        assert second.is_alive()  # at most one is in flight
        let_go.set()
        second.join()
    assert steps(tmp_path) == [10, 20]
    with opened(tmp_path) as saving:
        assert saving.resume == tmp_path / "shelf" / "student-00000020"
        assert read_manifest(saving.resume).mlflow_run == "1a"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as saving:
        save(saving, 10)

    def cut(own: Path, folder: Path, **_: Any) -> None:
        (folder / "ranks").mkdir(parents=True)
        raise SystemExit  # the thread is gone, as after a kill

    monkeypatch.setattr(module.checkpoint, "publish", cut)
    with pytest.raises(SystemExit), opened(tmp_path) as saving:
        save(saving, 20)
    assert len(list((tmp_path / "shelf").iterdir())) == 2
    with opened(tmp_path) as saving:
        assert saving.resume == tmp_path / "shelf" / "student-00000010"
    assert [path.name for path in (tmp_path / "shelf").iterdir()] == ["student-00000010"]


@pytest.mark.parametrize(
    ("number", "cause"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "the disk is read-only")],
)
def test_a_disk_that_takes_no_more_is_one_line_and_the_checkpoint_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, cause: str
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(target))

    with pytest.raises(UserError) as caught, opened(tmp_path) as saving:
        save(saving, 10)
        saving.wait()
        monkeypatch.setattr(checkpoint, "move_durably", refuse)
        save(saving, 20)
    assert str(caught.value).startswith(f"checkpoint of step 20 in {tmp_path / 'shelf'}: {cause};")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "shelf").iterdir()] == ["student-00000010"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("place", ["shelf", "tmp"])
def test_a_real_disk_that_is_full(tmp_path: Path, place: str) -> None:
    """In the folder of the run, and where the engine writes to first (PyTorch hides the cause)."""
    disk = tmp_path / place
    disk.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        full = pytest.raises(UserError, match=r"step 20 in \S+: the disk is full")
        with full, opened(tmp_path) as saving:
            save(saving, 10)
            saving.wait()
            save(saving, 20, size=2**20)
        assert steps(tmp_path) == [10]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_training_that_is_asked_to_end_saves_and_ends_at_the_next_step(tmp_path: Path) -> None:
    done: list[int] = []
    with pytest.raises(StoppedError), opened(tmp_path, asked=lambda: len(done) > 5) as saving:
        times = saving.every(1000, lambda step: save(saving, step))
        for step in range(1, 10_000):
            done.append(step)
            if times.is_due(step):
                times.call(step)
            threading.Event().wait(0.01)
    assert steps(tmp_path) == [done[-1]]
    assert 5 < done[-1] < 999


def test_a_training_that_is_not_asked_saves_every_so_many_steps(tmp_path: Path) -> None:
    with opened(tmp_path) as saving:
        times = saving.every(3, lambda step: save(saving, step))
        for step in range(1, 8):
            if times.is_due(step):
                times.call(step)
    assert steps(tmp_path) == [3, 6]


HANGING = """
import sys, time
from contextlib import nullcontext
from pathlib import Path
import torch.distributed as dist
from launchers.on_ray.stopping import Stopping
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def waits_for_ever(stopping):
    stopping.after_step()
    time.sleep(600)
with Stopping(nullcontext(lambda: False), 1.0, Path(sys.argv[1])) as stopping:
    print("steps", flush=True)
    waits_for_ever(stopping)
"""


def test_a_process_that_makes_no_step_ends_and_leaves_where_it_was(tmp_path: Path) -> None:
    stacks = tmp_path / "logs" / "stacks.txt"
    ended = subprocess.run(
        [sys.executable, "-c", HANGING, str(stacks)],
        timeout=240,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (1, "steps\n"), ended.stderr
    assert "waits_for_ever" in stacks.read_text()


def test_what_comes_between_two_steps_may_take_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed: list[float | None] = []
    timer = SimpleNamespace(
        dump_traceback_later=lambda seconds, **_: armed.append(seconds),
        cancel_dump_traceback_later=lambda: armed.append(None),
    )
    monkeypatch.setattr(stopping, "faulthandler", timer)
    with Stopping(nullcontext(lambda: False), 60, tmp_path / "stacks.txt") as steps:
        steps.after_step()
        assert armed == [60]
        steps.pause()
        assert armed == [60, None]
        steps.after_step()
        assert armed == [60, None, 60]
    assert armed[-1] is None
