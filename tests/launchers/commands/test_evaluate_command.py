"""`sbf evaluate`: the accuracy that a run has measured, and that of each class."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launchers.evaluating import positions
from sbf_dist.errors import UserError

BEFORE = Path(__file__).parents[1] / "before"
Sbf = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(BEFORE / "run", tmp_path / "run")
    shutil.copy(BEFORE / "before.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_accuracy_is_the_one_that_the_run_has_measured(sbf: Sbf, here: Path) -> None:
    code, out, err = sbf("evaluate", "run", "before.yaml", "--json")
    assert code == 0, err
    found = json.loads(out)
    rows = json.loads((here / "run" / "summary.json").read_text())["rows"]
    wanted = next(row for row in rows if row["network"] == "sbf-distilled")
    assert found["images"] == wanted["count"] == 500
    assert found["top1"] == pytest.approx(wanted["top1"], abs=1e-9)
    assert found["top5"] == pytest.approx(wanted["top5"], abs=0.0021)
    classes = found["classes"]
    assert sum(one["images"] for one in classes.values()) == 500
    hits = sum(one["images"] * one["top1"] for one in classes.values())
    assert hits == pytest.approx(500 * found["top1"])


def write_images(folder: Path, *classes: str) -> None:
    draw = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(2):
            pixels = draw.integers(0, 256, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.mark.parametrize(("place", "count"), [("val", 6), ("all", 12)])
def test_of_a_folder_val_is_taken_or_all_where_there_is_none(
    sbf: Sbf, here: Path, place: str, count: int
) -> None:
    if place == "val":
        write_images(here / "photos" / "train", "1", "3", "7")
        write_images(here / "photos" / "val", "1", "3", "7")
    else:
        write_images(here / "photos", "0", "1", "2", "3", "4", "9")
    code, out, err = sbf("evaluate", "run", "photos")
    assert code == 0, err
    assert f"{count} images" in out
    assert "using 0.875" in out


def test_classes_are_matched_by_name() -> None:
    assert positions(["bee", "ant"], ["ant", "bee", "cow"], "photos").tolist() == [1, 0]
    assert positions(["x", "y"], ["0", "1"], "photos").tolist() == [0, 1]
    message = "data photos: the student does not know the class 'emu'; it knows ant, bee"
    with pytest.raises(UserError, match=message):
        positions(["ant", "emu"], ["ant", "bee"], "photos")
