"""How a checkpoint reaches the disk; what is in it: test_two_ranks.py."""

import os
from pathlib import Path
from typing import Any

import pytest

from sbf_dist.train import checkpoint


class _Engine:
    def zero_optimization_stage(self) -> int:
        return 0


def test_each_file_is_on_the_disk_before_it_has_its_name_and_the_manifest_is_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_shards(engine: Any, folder: Path, tag: str) -> None:
        (folder / tag).mkdir(parents=True)
        (folder / tag / "mp_rank_00_model_states.pt").write_text("weights")

    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        events.append(("flushed", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def noting_replace(source: Path, target: Path, **options: Any) -> None:
        events.append(("named", Path(source).name))
        events.append(("as", Path(target).name))
        replace(source, target, **options)

    monkeypatch.setattr(checkpoint, "save_shards", write_shards)
    monkeypatch.setattr(checkpoint, "refuse_non_finite", lambda engine, step: None)
    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    checkpoint.save(_Engine(), tmp_path / "saved", step=1, loader_state={}, digests={})
    named = [name for event, name in events if event == "named"]
    assert len(named) == 4
    for name in named:
        assert events.index(("flushed", name)) < events.index(("named", name))
    assert [name for event, name in events if event == "as"][-1] == "manifest.json"
    assert ("flushed", "saved") in events[events.index(("as", "manifest.json")) :]
    checkpoint.verify(tmp_path / "saved")
