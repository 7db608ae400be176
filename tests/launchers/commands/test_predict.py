"""`sbf predict`: classes of pictures from everywhere, by ONNX Runtime alone."""

import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbf_dist.export.sbf_student import Student

BEFORE = Path(__file__).parents[1] / "before" / "run"
ROOT = Path(__file__).parents[3]
Sbf = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a run, a folder of pictures with another in it, and a file that is none."""
    shutil.copytree(BEFORE, tmp_path / "run")
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in ("a.png", "b.JPG", "deep/c.png"):
        pixels = draw.integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize("model", ["run", "run/student", "run/student/student.onnx"])
def test_classes_are_those_of_the_network_for_the_picture_as_evaluated(
    sbf: Sbf, here: Path, model: str
) -> None:
    code, out, _ = sbf("predict", model, "photos/a.png", "--json", "--crop", "1", "--top", "3")
    assert code == 0
    ((line),) = lines(out)
    student = Student(here / "run" / "student" / "student.onnx")
    student.crop = 1.0
    found = student.predict(student.read("photos/a.png")[None])["probabilities"][0]
    order = np.argsort(-found)[:3]
    assert line["image"] == "photos/a.png"
    assert [one["class"] for one in line["top"]] == [str(i) for i in order]
    assert [one["probability"] for one in line["top"]] == pytest.approx(found[order], abs=1e-6)


@pytest.mark.parametrize(
    ("places", "listed", "wanted"),
    [
        (["photos"], "", ["photos/a.png", "photos/b.JPG", "photos/deep/c.png"]),
        (["photos/*.png"], "", ["photos/a.png"]),
        (["photos/**/*.png"], "", ["photos/a.png", "photos/deep/c.png"]),
        (["-"], "photos/b.JPG\n\nphotos/a.png\r\n", ["photos/b.JPG", "photos/a.png"]),
        (["photos/b.JPG", "photos/deep"], "", ["photos/b.JPG", "photos/deep/c.png"]),
    ],
    ids=["folder", "pattern", "deep pattern", "list", "several"],
)
def test_pictures_come_from_files_folders_patterns_and_a_list(
    sbf: Sbf,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    places: list[str],
    listed: str,
    wanted: list[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(listed))
    code, out, _ = sbf("predict", "run", *places, "--json", "--crop", "0.9")
    assert code == 0
    assert [line["image"] for line in lines(out)] == wanted


def test_a_picture_that_is_not_readable_is_named_and_the_others_go_on(
    sbf: Sbf, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("gone.png\nphotos/notes.txt\nphotos/a.png\n"))
    code, out, err = sbf("predict", "run", "-", "--json", "--crop", "1")
    assert code == 1
    gone, notes, good = lines(out)
    assert gone == {"image": "gone.png", "error": "does not exist"}
    assert notes["error"] == "not a readable image (unknown format)"
    assert len(good["top"]) == 5
    assert err.splitlines() == [
        "sbf: gone.png: does not exist",
        "sbf: photos/notes.txt: not a readable image (unknown format)",
        "sbf: 2 of 3 images are not readable",
    ]


def test_a_table_has_a_row_for_each_picture(sbf: Sbf, here: Path) -> None:
    code, out, err = sbf("predict", "run", "photos", "--top", "2")
    assert code == 0
    heading, *rows = out.splitlines()
    assert heading.split() == ["image", "top", "1", "top", "2"]
    assert [row.split()[0] for row in rows] == [
        "photos/a.png",
        "photos/b.JPG",
        "photos/deep/c.png",
    ]
    assert all(row.count("%") == 2 for row in rows)
    # Of a student of an earlier version the crop is not known, and what is taken is said.
    assert (
        err == "sbf: run does not say which crop it was evaluated with: using 0.875; set --crop "
        "to change it\n"
    )


def test_a_line_is_not_broken_where_there_is_no_terminal(sbf: Sbf, here: Path) -> None:
    long = here / ("a-long-name-" * 8) / "a.png"
    long.parent.mkdir()
    long.write_bytes((here / "photos" / "a.png").read_bytes())
    _, out, _ = sbf("predict", "run", long)
    assert [line.split()[0] for line in out.splitlines()] == ["image", str(long)]


def test_no_pytorch_is_needed(here: Path) -> None:
    code = """
        import sys
        sys.modules["torch"] = None  # importing it fails
        sys.argv = ["sbf", "predict", "run", "photos", "--json"]
        from launchers.cli import main
        main()
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(lines(done.stdout)) == 3
