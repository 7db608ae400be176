"""Which checkpoint counts: files that are torn, lost or left over, without Ray and workers."""

import json
import logging
from pathlib import Path

import pytest

from launchers.on_ray.checkpoints import Shelf
from sbf_dist.errors import UserError
from sbf_dist.files import sha256
from sbf_dist.train import checkpoint
from sbf_dist.train.manifest import FORMAT

SHARD = "deepspeed/state/mp_rank_00_model_states.pt"


def shelf(folder: Path, training: str = "student", keep_last: int = 3) -> Shelf:
    return Shelf(folder, training, keep_last)


def put(shelf: Shelf, step: int, top1: float | None = None) -> Path:
    """Put a checkpoint with one shard on the shelf, as a training does."""
    partial = shelf.place_to_write(step, "token")
    entries = {}
    for name in (SHARD, "ranks/00000.json", "ranks/00000.safetensors"):
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(range(step % 256)) * 3 + b"end" if name == SHARD else b"{}")
        entries[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": 1,
        "digests": {"training": shelf.training},
        "files": entries,
    } | ({} if top1 is None else {"top1": top1})
    (partial / "manifest.json").write_text(json.dumps(manifest))
    return shelf.accept(partial, step)


def truncate(path: Path) -> None:
    shard = path / SHARD
    shard.write_bytes(shard.read_bytes()[:-1])


def change(path: Path) -> None:
    shard = path / SHARD
    shard.write_bytes(b"\xff" + shard.read_bytes()[1:])


def test_nothing_is_gone_on_from_where_there_never_was_a_checkpoint(tmp_path: Path) -> None:
    assert shelf(tmp_path / "none").newest_whole() is None
    shelf(tmp_path / "none").tidy()


def test_the_newest_is_taken_and_the_last_so_many_are_kept(tmp_path: Path) -> None:
    kept = shelf(tmp_path, keep_last=2)
    for step in (900, 1000, 1100):
        newest = put(kept, step)
    assert kept.newest_whole() == newest
    assert kept.names() == {"student-00001000", "student-00001100"}
    assert {path.name for path in tmp_path.iterdir()} == kept.names()


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (truncate, f"{SHARD} is damaged: 62 bytes instead of 63"),
        (change, f"{SHARD} is damaged: its SHA-256 is not the one written"),
        (lambda p: (p / SHARD).unlink(), f"{SHARD} is missing"),
        (lambda p: (p / "manifest.json").unlink(), "has no manifest.json"),
        (lambda p: (p / "manifest.json").write_text(""), "is damaged: JSON"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before_with_a_warning_that_names_both(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm, fault: str
) -> None:
    before, newest = put(shelf(tmp_path), 10), put(shelf(tmp_path), 20)
    harm(newest)
    with caplog.at_level(logging.WARNING):
        assert shelf(tmp_path).newest_whole() == before
    (line,) = caplog.messages
    assert str(newest) in line
    assert fault in line
    assert line.endswith("student-00000020.damaged; training student resumes from " + before.name)
    # What the training then writes at that step takes its place; the damaged one is not counted.
    assert put(shelf(tmp_path, keep_last=2), 15).exists()
    assert shelf(tmp_path).names() == {"student-00000010", "student-00000015"}


def test_two_damaged_ones_are_passed_over(tmp_path: Path) -> None:
    before = put(shelf(tmp_path), 10)
    for step in (20, 30):
        truncate(put(shelf(tmp_path), step))
    assert shelf(tmp_path).newest_whole() == before


def test_where_none_is_whole_the_error_lists_them_and_leaves_them(tmp_path: Path) -> None:
    for step in (10, 20):
        truncate(put(shelf(tmp_path), step))
    with pytest.raises(UserError) as caught:
        shelf(tmp_path).newest_whole()
    assert "\n" not in str(caught.value)
    for name in (f"student-00000010: {SHARD} is damaged", "student-00000020: deep"):
        assert name in str(caught.value)
    assert "--again" in str(caught.value)
    assert shelf(tmp_path).names() == {"student-00000010", "student-00000020"}


def test_checkpoints_of_other_trainings_are_neither_taken_nor_removed(tmp_path: Path) -> None:
    other = put(shelf(tmp_path, "teacher"), 500)
    (put(shelf(tmp_path, "student-2"), 7) / "manifest.json").unlink()
    mine = put(shelf(tmp_path, keep_last=1), 10)
    assert shelf(tmp_path).newest_whole() == mine
    assert other.exists()


@pytest.mark.parametrize("content", ["", '{"checkpoint_results": [', "{}"])
def test_a_torn_list_of_rays_own_is_no_matter(tmp_path: Path, content: str) -> None:
    newest = put(shelf(tmp_path), 10)
    old = newest.rename(tmp_path / "checkpoint_2026-11-26_10-00-00.123456")  # as earlier versions
    (tmp_path / "checkpoint_manager_snapshot.json").write_text(content)
    shelf(tmp_path).tidy()
    assert shelf(tmp_path).newest_whole() == old
    assert not (tmp_path / "checkpoint_manager_snapshot.json").exists()


def test_folders_that_were_cut_are_removed_and_whole_ones_stay(tmp_path: Path) -> None:
    kept = shelf(tmp_path)
    whole = put(kept, 10)
    (kept.place_to_write(20, "abc") / "deepspeed").mkdir(parents=True)
    (tmp_path / "checkpoint_2026-11-26_10-00-00.123456" / "ranks").mkdir(parents=True)
    kept.tidy()
    assert list(tmp_path.iterdir()) == [whole]


def test_a_checkpoint_of_the_same_step_takes_the_place_of_an_older_attempts(tmp_path: Path) -> None:
    truncate(put(shelf(tmp_path), 10))
    again = put(shelf(tmp_path), 10)
    checkpoint.verify(again)
    assert list(tmp_path.iterdir()) == [again]


def test_the_best_is_kept_beside_the_newest_until_there_is_a_better_one(tmp_path: Path) -> None:
    kept = Shelf(tmp_path, "student", keep_last=2, keep_best=True)
    names = []
    for step, top1 in enumerate([0.5, 0.7, 0.6, 0.6, 0.7, None, 0.8, 0.1], 1):
        put(kept, step, top1)
        names.append(sorted(int(name.rpartition("-")[2]) for name in kept.names()))
    assert names == [[1], [1, 2], [2, 3], [2, 3, 4], [4, 5], [5, 6], [6, 7], [7, 8]]


def test_without_scores_the_newest_are_kept(tmp_path: Path) -> None:
    kept = Shelf(tmp_path, "student", keep_last=2, keep_best=True)
    for step in (1, 2, 3):
        put(kept, step)
    assert len(kept.names()) == 2
