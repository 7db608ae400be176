"""The stage evaluate: what an answer of each row costs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tiny_run import networks_of

from launchers.run import outcome, work
from sbf_dist import models


def rows(monkeypatch: pytest.MonkeyPatch, runs: Path, *overrides: str) -> dict[str, dict[str, Any]]:
    networks = networks_of(runs, *overrides, "baselines=null")
    compressed = networks.folder.result("compress")
    compressed.parent.mkdir(parents=True, exist_ok=True)
    compressed.write_text(json.dumps({"zeroed": {"macs": 1, "params": 1}}))
    monkeypatch.setattr(work, "build_network", lambda *_: models.build("cifar_resnet8", 10))
    monkeypatch.setattr(work, "latencies_if_quiet", lambda *_: [3.0])
    monkeypatch.setattr(work, "optimize", lambda model: model)
    monkeypatch.setattr(outcome, "check_scores", lambda *_: None)
    scores = {row.name: {"top1": 0.5, "agreement": None, "kl": None} for row in networks.rows()}
    quiet = SimpleNamespace(log_metrics=lambda *_: None, attempt=lambda _: 0)
    session = SimpleNamespace(
        networks=networks,
        folder=networks.folder,
        num_classes=10,
        display=SimpleNamespace(show=lambda _: None),
        tracker=quiet,
        launch=lambda *_: scores,
    )
    found = work.evaluate(cast("Any", session), cast("Any", quiet))["rows"]
    return {row["network"]: row for row in found}


def test_a_teacher_of_two_views_costs_two_passes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    once = rows(monkeypatch, tmp_path)
    twice = rows(monkeypatch, tmp_path, "teachers.1.views=2")
    for name, times in (("one", 1), ("two", 2), ("ensemble", 1.5), ("sbf-distilled", 1)):
        assert twice[name]["macs"] == times * once[name]["macs"]
        assert twice[name]["latency_ms"] == times * once[name]["latency_ms"]
        assert twice[name]["params"] == once[name]["params"]
