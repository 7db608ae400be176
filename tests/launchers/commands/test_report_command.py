"""`sbf report`: what it writes where, and what it refuses."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

BEFORE = Path(__file__).parents[1] / "before" / "run"
Sbf = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sbf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sbf: Sbf) -> Sbf:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("run/stages").mkdir(parents=True)
    shutil.copy(BEFORE / "recipe.json", "run")
    shutil.copy(BEFORE / "summary.json", "run")
    return sbf


def test_a_page_lies_in_the_run_and_that_on_several_here(sbf: Sbf) -> None:
    assert sbf("report", "run") == (0, "report  run/report.html\n", "")
    shutil.copytree("run", "other")
    assert sbf("report", "run", "other") == (0, "report  report.html\n", "")
    assert sbf("report", "run", "--out", "photos/page.html")[0] == 0
    assert "<h1>run and other</h1>" in Path("report.html").read_text()
    assert Path("photos/page.html").stat().st_size == Path("run/report.html").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "run nowhere: does not exist; give the folder of a run, RUNS/NAME"),
        (["run", "nowhere"], "run nowhere: does not exist; give the folder of a run, RUNS/NAME"),
        (["photos"], "run photos: has neither recipe.json nor stages/; give the folder of a run"),
        (["run/recipe.json"], "run run/recipe.json: is a file; give the folder of a run"),
        (["run", "--out", "no/page.html"], "--out no/page.html: must be a file in a folder that"),
        (["run", "--out", "photos"], "--out photos: must be a file in a folder that exists"),
        (["run", "--images", "0"], "Invalid value for '--images'"),
        ([], "Missing argument 'RUN"),
    ],
)
def test_what_is_no_run_is_answered_in_one_line(
    sbf: Sbf, arguments: list[str], message: str
) -> None:
    code, out, err = sbf("report", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert not Path("report.html").exists()
