"""How a checkpoint reaches the disk, and what it must be of; what is in it: test_two_ranks.py."""

import os
from pathlib import Path

import pytest

from sbf_dist.train import checkpoint
from sbf_dist.train.checkpoint import Written


def test_all_files_are_on_the_disk_before_the_manifest_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    for name in ("deepspeed/state/mp_rank_00_model_states.pt", "ranks/00000.json"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text("{}")
    (own / "ranks/00000.safetensors").write_bytes(b"")
    events: list[tuple[str, Path]] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        events.append(("flushed", Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def noting_replace(source: Path, target: Path) -> None:
        events.append(("flushed as", Path(source)))
        events.append(("named", Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    saved = tmp_path / "saved"
    checkpoint.publish(own, saved, step=1, digests={})
    named = events.index(("named", saved / "manifest.json"))
    for path in saved.rglob("*"):
        if path.name != "manifest.json":
            assert ("flushed", path) in events[:named], path
    assert events[named - 1][1].name.startswith(".manifest.json.")
    assert ("flushed", events[named - 1][1]) in events[:named]
    assert ("flushed", saved) in events[named:]
    checkpoint.verify(saved)


WRITTEN = Written(
    zero_stage=1,
    optimizer="SGD",
    shapes={"student.fc.weight": [10, 512], "student.bn.running_mean": [512]},
    reads={"seed": 0, "distill.training.optimizer.lr": 0.1, "teachers.0.model": "a"},
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"zero_stage": 2}, "at ZeRO stage 1, this training at 2"),
        ({"optimizer": "AdamW"}, "with the optimizer SGD, this training with AdamW"),
        (
            {"shapes": {"student.fc.weight": [100, 512], "student.bn.running_mean": [512]}},
            "with student.fc.weight of shape (10, 512), this training with student.fc.weight of "
            "shape (100, 512)",
        ),
        (
            {"shapes": {"student.fc.weight": [10, 512]}},
            "with student.bn.running_mean of shape (512), this training without "
            "student.bn.running_mean",
        ),
        (
            {"shapes": WRITTEN.shapes | {"student.fc.bias": [10]}},
            "without student.fc.bias, this training with student.fc.bias of shape (10)",
        ),
    ],
)
def test_what_differs_is_named(change: dict, expected: str | None) -> None:
    assert WRITTEN.difference(WRITTEN.model_copy(update=change)) == expected


def test_values_of_the_recipe_that_differ_are_named() -> None:
    other = WRITTEN.model_copy(
        update={"reads": {"seed": 0, "distill.training.optimizer.lr": 0.05, "compress.macs": 0.5}}
    )
    assert WRITTEN.changed_values(other) == [
        "distill.training.optimizer.lr = 0.1, this run has 0.05",
        "teachers.0.model = 'a', this run has None",
        "compress.macs = None, this run has 0.5",
    ]
