"""The stage prepare: what it finds in the images that later stages would refuse."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from launchers.run import work
from launchers.run.folder import RunFolder
from pipelines.index import DataIndex
from sbf_dist.errors import UserError
from sbf_dist.recipe import validate

CONTENT = {
    "name": "tiny",
    "data": {"source": "digits", "image_size": 16, "labelled_per_class": 2},
    "teachers": [
        {"name": "one", "model": "cifar_resnet8", "training": {"steps": 9, "batch_size": 40}}
    ],
    "compress": {"teacher": "one", "macs": 0.5},
    "distill": {"training": {"steps": 9, "batch_size": 40}},
}


def prepare(monkeypatch: pytest.MonkeyPatch, runs: Path, count: str, unlabelled: int) -> Any:
    parts = {"labelled": 20, "unlabelled": unlabelled, "validation": 5}
    index = SimpleNamespace(
        root=runs,
        digest="0",
        classes=["a", "b"],
        skipped=[],
        parts={part: np.arange(size) for part, size in parts.items()},
        save=lambda folder: None,
    )
    monkeypatch.setattr(work, "index_images", lambda *_: cast("DataIndex", index))
    session = SimpleNamespace(
        recipe=validate(CONTENT, [f"workers.count={count}"], "recipe"),
        folder=RunFolder(runs, "tiny"),
        display=SimpleNamespace(say=lambda line: None),
    )
    return work.prepare(cast("Any", session), cast("Any", SimpleNamespace(log_params=print)))


def test_workers_that_cannot_share_both_parts_of_a_step_are_refused_with_the_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"workers.count = 8 must divide the 10 labelled and 30"):
        prepare(monkeypatch, tmp_path, "8", unlabelled=100)
    assert prepare(monkeypatch, tmp_path, "[2, 8]", unlabelled=100)["unlabelled"] == 100
    assert prepare(monkeypatch, tmp_path, "8", unlabelled=0)["unlabelled"] == 0
