"""`sbf report`: what it writes where, and what it refuses."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sbf_dist.object_storage import ObjectFolder

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


def test_a_run_in_an_object_store_is_called_by_its_address(sbf: Sbf, s3) -> None:
    address = f"{s3.bucket}/runs/stored"
    store = ObjectFolder.at(address)
    for name in ("recipe.json", "summary.json"):
        store.write(name, Path("run", name).read_bytes())
    store.write("plan.json", b"{}")
    assert sbf("report", address) == (0, "report  report.html\n", "")
    page = Path("report.html").read_text()
    assert "<h1>stored</h1>" in page
    assert f"plan {address}/plan.json: " in page
    assert "sbf-looked-at-" not in page


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
