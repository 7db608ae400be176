"""`sbf label`: what it runs, and the report on what was written before."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from launchers.commands import label, run
from sbf_dist.files import write_json

BEFORE = Path(__file__).parents[1] / "before"
RECIPE = Path(__file__).parents[3] / "recipes" / "digits.yaml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of the version before."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(BEFORE / "run", tmp_path / "before")


@pytest.mark.parametrize("word", [[], ["RECIPE"]])
def test_it_is_a_run_until_the_pseudo_labels(sbf, monkeypatch, word) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        label.run, "command", lambda *given, **options: asked.append((given, options))
    )
    order = ["label", *word, RECIPE, "workers.count=1", "--runs", "here", "--again", "teachers"]
    assert sbf(*order) == (0, "", "")
    options = {"until": run.StageName("pseudo-labels"), "again": run.StageName("teachers")}
    assert asked == [((RECIPE, ["workers.count=1"], "here"), options)]


def test_the_report_of_a_run_is_a_table_and_a_picture(sbf, folder) -> None:
    code, out, err = sbf("label", "report", folder)
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert rows["labelled"][0] == "50"
    assert rows["unlabelled"][:4] == ["1247", "12.8", "%", "-"]  # nobody noted who agreed
    assert rows["unlabelled"][4].replace(".", "").isdecimal()
    assert rows["used"][0] == "1247"
    assert "validation" not in rows  # which the version before did not label
    assert image.imread("labels.png").shape[2] == 4


def test_the_same_as_json(sbf, folder) -> None:
    code, out, err = sbf("label", "report", folder / "pseudo-labels", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["images"] == 1297
    assert report["classes"] == [str(digit) for digit in range(10)]
    assert [row["part"] for row in report["parts"]] == ["labelled", "unlabelled", "used"]
    assert sum(report["per_class"]["predicted"]) == 1247
    assert not Path("labels.png").exists()


def test_a_store_alone_says_less(sbf, folder, tmp_path) -> None:
    alone = shutil.copytree(folder / "pseudo-labels", tmp_path / "somewhere" / "store")
    code, _, err = sbf("label", "report", alone)
    assert code == 2
    assert (
        "were written by an older version, without the classes; give the folder of their run" in err
    )
    manifest = json.loads((alone / "manifest.json").read_text())
    write_json(alone / "manifest.json", manifest | {"classes": list("abcdefghij")})
    code, out, err = sbf("label", "report", alone, "--json")
    assert (code, err) == (0, "")
    (row,) = json.loads(out)["parts"]
    assert (row["part"], row["images"], row["accuracy"]) == ("all", 1297, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "folder nowhere has no pseudo-labels: give a run's folder, or a store's"),
        (["before", "--out", "no/folder.png"], "--out no/folder.png: must be a file in a folder"),
        (["before", "--out", "before"], "--out before: must be a file in a folder that exists"),
        (["before", "--json", "--out", "x.png"], "--out x.png: is for the picture, which --json"),
        ([], "Missing argument 'DIR'"),
    ],
)
def test_a_report_that_cannot_be_made_is_one_line(sbf, folder, arguments, message) -> None:
    code, out, err = sbf("label", "report", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("sbf: ")
    assert message in err
    assert err.count("\n") == 1


def test_pseudo_labels_of_other_images_than_the_runs_are_refused(sbf, folder) -> None:
    manifest = json.loads((folder / "pseudo-labels" / "manifest.json").read_text())
    manifest["origin"]["data"] = "other"
    write_json(folder / "pseudo-labels" / "manifest.json", manifest)
    code, _, err = sbf("label", "report", folder)
    assert code == 2
    assert "belong to other images than the index in" in err


def test_a_recipe_that_is_not_there_is_one_line(sbf) -> None:
    for arguments, message in (
        (["nowhere.yaml"], "recipe nowhere.yaml does not exist"),
        ([], "Missing argument 'RECIPE'"),
        ([RECIPE, "pseudo_labels.adaptive=true"], "adaptive = True needs a threshold above 0"),
        ([RECIPE, "pseudo_labels.min_agreement=2"], "min_agreement = 2 must be less than or equal"),
    ):
        code, out, err = sbf("label", *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
