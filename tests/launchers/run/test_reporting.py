"""The page on a run: of a folder that an earlier version wrote, of half a run, in a browser."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launchers.run.folder import RunFolder
from launchers.run.reporting import Request, contents_of, write_page
from sbf_dist.errors import UserError
from sbf_dist.report.contents import Layers, Missing, Predictions, RunContents
from sbf_dist.tracking.journal import Journal, metrics_entry

BEFORE = Path(__file__).parents[1] / "before" / "run"
REPORT = {
    "teachers": ["teacher-1", "teacher-2"],
    "classes": [str(n) for n in range(10)],
    "parts": [],
    "per_class": {"predicted": [1] * 10},
    "confidence": {"unlabelled": [2, 8]},
    "reliability": {},
    "agreement": [],
}
LIMIT_MS = 240_000
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as an earlier version left it, and as ours would: with journals and a labels' report.

    Its images are written again, as they are gone.
    """
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(BEFORE, runs / "before")
    shutil.copytree(BEFORE, runs / "newer")
    losses = Journal(runs / "newer" / "tracking" / "distill")
    for step in (4, 8):
        losses.append(metrics_entry({"sbf-distilled/loss": 1 / step}, step))
    (runs / "newer" / "pseudo-labels" / "report.json").write_text(json.dumps(REPORT))
    return runs


@pytest.fixture(scope="module")
def before(runs: Path) -> RunContents:
    return contents_of("runs/before", RunFolder(runs, "before"), Request())


def why(part: Any) -> str:
    assert isinstance(part, Missing)
    return part.why


def test_what_is_found_is_what_the_run_measured(before: RunContents) -> None:
    summary = json.loads((BEFORE / "summary.json").read_text())["rows"]
    assert before.rows == summary
    assert before.student == summary[-1]
    found = before.predictions
    assert isinstance(found, Predictions)
    # As all workers together counted them, one image after another.
    assert found.images == found.available == summary[-1]["count"]
    assert found.counts.trace() / found.images == pytest.approx(summary[-1]["top1"], abs=0.003)
    assert len(found.examples) > 8
    assert all(one.label != one.predicted for one in found.examples)


def test_layers_are_those_of_the_last_round(before: RunContents) -> None:
    assert isinstance(before.layers, Layers)
    assert before.layers.network == "sbf-round-2-fitted"
    assert [view.kept_of for view in before.layers.views] == [
        len(before.plan.layers[view.name].kept) for view in before.layers.views
    ]
    assert all(c.error is not None for view in before.layers.views for c in view.channels)


def test_what_an_earlier_version_did_not_keep_is_found_now_or_named(before: RunContents) -> None:
    assert "without journals" in why(before.curves)
    assert not isinstance(before.labels, Missing)
    assert [part["part"] for part in before.labels["parts"]] == ["labelled", "unlabelled", "used"]


def test_of_a_run_that_has_only_begun_all_that_is_missing_is_named(runs: Path) -> None:
    begun = runs / "begun"
    shutil.copytree(BEFORE, begun)
    for name in ("evaluate", "distill", "compress", "export", "pseudo-labels"):
        (begun / "stages" / f"{name}.json").unlink()
    for name in ("weights", "plans", "pseudo-labels"):
        shutil.rmtree(begun / name)
    for name in ("plan.json", "summary.json"):
        (begun / name).unlink()
    run = contents_of("begun", RunFolder(runs, "begun"), Request())
    assert [stage.name for stage in run.stages if stage.done] == ["prepare", "teachers"]
    assert "the stage evaluate is not done" in why(run.rows)
    assert "the stage compress is not done" in why(run.plan)
    assert "the stage compress is not done" in why(run.layers)
    assert "the stage compress is not done" in why(run.predictions)
    assert "the stage pseudo-labels is not done" in why(run.labels)


def test_code_that_a_folder_names_is_not_run(runs: Path) -> None:
    own = runs / "own"
    shutil.copytree(BEFORE, own)
    recipe = json.loads((own / "recipe.json").read_text())
    recipe["teachers"][0]["model"] = "nets.py:make"
    (own / "recipe.json").write_text(json.dumps(recipe))
    run = contents_of("own", RunFolder(runs, "own"), Request())
    assert "nets.py:make is your own code" in why(run.predictions)
    assert "nets.py:make is your own code" in why(run.layers)
    trusted = contents_of("own", RunFolder(runs, "own"), Request(own_code=True))
    assert "nets.py" in why(trusted.predictions)
    assert "your own code" not in why(trusted.predictions)


def test_damaged_files_are_named(runs: Path) -> None:
    damaged = runs / "damaged"
    shutil.copytree(BEFORE, damaged)
    (damaged / "recipe.json").write_text("{")
    (damaged / "summary.json").write_text("[]")
    run = contents_of("damaged", RunFolder(runs, "damaged"), Request())
    assert "recipe.json is damaged" in why(run.recipe)
    assert "recipe.json is damaged" in why(run.predictions)
    assert "summary.json is damaged" in why(run.rows)


def test_a_layer_that_is_not_converted_cannot_be_looked_into(runs: Path) -> None:
    with pytest.raises(
        UserError, match=r"--layer conv: is not a converted layer of runs/x; converted are"
    ):
        contents_of("runs/x", RunFolder(runs, "before"), Request(layers=["conv"]))


def test_more_runs_than_a_page_has_letters_for_are_refused(runs: Path, tmp_path: Path) -> None:
    many = {str(number): RunFolder(runs, "before") for number in range(27)}
    with pytest.raises(UserError, match=r"^27 runs: at most 26 fit on one page$"):
        write_page(many, tmp_path / "page.html", Request())
    assert not (tmp_path / "page.html").exists()


@pytest.fixture(scope="module")
def page(runs: Path) -> Path:
    folders = {name: RunFolder(runs, name) for name in ("newer", "before")}
    write_page(folders, runs / "page.html", Request(images=100))
    return runs / "page.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        # Without its sandbox, which root does not get.
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=LIMIT_MS
        )
        yield browser
        browser.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_a_browser_draws_all_charts_without_network_and_complaint(
    browser: Any, page: Path, scheme: str, width: int
) -> None:
    viewport = {"width": width, "height": 800}
    context = browser.new_context(color_scheme=scheme, viewport=viewport, offline=True)
    context.set_default_timeout(LIMIT_MS)
    tab = context.new_page()
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-drawn]")
    charts = tab.locator("[data-chart]")
    assert charts.count() == len(re.findall("data-chart=", page.read_text()))
    marks = ".scatterlayer .trace path, .barlayer .trace path, .heatmaplayer image"
    empty = f"nodes => nodes.filter(n => !n.querySelector('{marks}')).map(n => n.dataset.chart)"
    assert charts.evaluate_all(empty) == []
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    ink = tab.locator("[data-chart] .xtitle").first.evaluate("node => getComputedStyle(node).fill")
    assert ink == {"light": "rgb(88, 99, 117)", "dark": "rgb(155, 167, 182)"}[scheme]
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the results"
    assert not complaints
    context.close()
