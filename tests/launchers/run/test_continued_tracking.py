"""A run whose tracking.json is gone goes on with the MLflow run that its checkpoints name."""

import json
import os
from pathlib import Path

import pytest

from launchers.run.continued_tracking import find_again
from launchers.run.folder import RunFolder
from sbf_dist.train.manifest import FORMAT, Manifest


def manifest(step: int, run_id: str | None) -> str:
    files = Manifest(
        format=FORMAT, step=step, world_size=1, digests={}, files={}, mlflow_run=run_id
    )
    return files.model_dump_json()


def found(folder: RunFolder) -> str | None:
    find_again(folder)
    if not folder.tracking.exists():
        return None
    return str(json.loads(folder.tracking.read_text())["run_id"])


def test_the_newest_checkpoint_that_is_whole_and_names_a_run_counts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "tiny")
    assert found(folder) is None
    contents = [manifest(90, "old"), manifest(5, "newest"), manifest(6, None), "{"]
    for age, content in enumerate(reversed(contents)):
        path = folder.checkpoints / "distill" / f"net-{age}" / "manifest.json"
        path.parent.mkdir(parents=True)
        path.write_text(content)
        os.utime(path, (1e9 - age, 1e9 - age))
    assert found(folder) == "newest"
    folder.tracking.write_text("{")
    assert found(folder) == "newest"
    folder.tracking.write_text('{"run_id": "its own"}')
    assert found(folder) == "its own"


def test_checkpoints_of_an_object_store_are_asked(
    s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBF_DIST_CACHE", str(tmp_path))
    folder = RunFolder.at(f"{s3.bucket}/runs", "tiny")
    assert folder.copy is not None
    key = "checkpoints/distill/net-00000005.1a/manifest.json"
    folder.copy.store.write(key, manifest(5, "stored").encode())
    folder.root.mkdir(parents=True)
    assert found(folder) == "stored"
