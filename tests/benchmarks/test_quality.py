import importlib.util
import json
from pathlib import Path

import pytest

from sbf_dist.compare_recipe import load

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("quality", ROOT / "benchmarks" / "quality.py")
quality = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quality)


@pytest.mark.parametrize("settings", [quality.SETTINGS, quality.QUICK], ids=["whole", "quick"])
@pytest.mark.parametrize("data", quality.DATA)
def test_its_settings_fit_the_recipes(data, settings):
    recipe = load(ROOT / "recipes" / f"compare-{data}.yaml", settings)
    assert recipe.data.source == data
    assert "sbf" in recipe.methods
    assert 0.5 in recipe.macs
    assert recipe.recovery.steps[-1] <= 240


def test_the_file_tells_what_was_measured_with_what(tmp_path):
    path = tmp_path / "results" / "quality.json"
    rows = [{"data": "digits", "model": "cifar_resnet14", "method": "sbf", "top1_mean": 0.9}]
    quality.write(path, quality.report(rows, 12.3))
    report = json.loads(path.read_text())
    assert report["rows"] == rows
    assert report["seconds"] == 12
    assert {"date", "machine", "version.torch"} <= report.keys()
    assert [p.name for p in path.parent.iterdir()] == ["quality.json"]
