"""The stage prepare: what it finds in the images that later stages would refuse."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from tiny_run import BATCHES_OF_40

from launchers.run import work
from launchers.run.folder import RunFolder
from launchers.run.networks import Networks
from pipelines.index import DataIndex
from sbf_dist.errors import UserError
from sbf_dist.recipe import validate


def prepare(
    monkeypatch: pytest.MonkeyPatch, runs: Path, *overrides: str, unlabelled: int = 100
) -> Any:
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
    recipe, folder = validate(BATCHES_OF_40, overrides, "recipe"), RunFolder(runs, "tiny")
    session = SimpleNamespace(
        recipe=recipe,
        folder=folder,
        networks=Networks.of(recipe, folder),
        display=SimpleNamespace(say=lambda line: None),
    )
    return work.prepare(cast("Any", session), cast("Any", SimpleNamespace(log_params=print)))


def test_workers_that_cannot_share_both_parts_of_a_step_are_refused_with_the_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"workers.count = 8 must divide the 10 labelled and 30"):
        prepare(monkeypatch, tmp_path, "workers.count=8")
    assert prepare(monkeypatch, tmp_path, "workers.count=[2, 8]")["unlabelled"] == 100
    assert prepare(monkeypatch, tmp_path, "workers.count=8", unlabelled=0)["unlabelled"] == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teachers.0.training={epochs: 2, warmup: 7}", "teachers.0.training: warm-up of 7 steps"),
        ("baselines={steps: 7, warmup_epochs: 30}", "baselines: warm-up of 10 steps must be"),
        (
            "distill={training: {epochs: 2, warmup: 3}, labels_last: {share: 0.6}}",
            "distill.training: distill.labels_last leaves 2 of 5 steps before, which must be more "
            "than the 3 of the warm-up",
        ),
    ],
)
def test_a_warm_up_as_long_as_its_training_is_refused_with_the_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError) as refused:
        prepare(monkeypatch, tmp_path, override)
    assert str(refused.value).startswith(message)
