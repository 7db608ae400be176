"""A run whose recipe has changed, with the real command: what is done anew, and what is kept."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Sbf = Callable[..., tuple[int, str, str]]
SBF = Path(sys.executable).with_name("sbf")
RECIPE = """
name: tiny
data: {source: digits, image_size: 12, labelled_per_class: 5, crop: 1.0}
teachers:
  - {name: one, model: cifar_resnet8_w4, training: {steps: 4, batch_size: 16}}
  - {name: two, model: "mine.py:net", training: {steps: 4, batch_size: 16}}
compress: {teacher: one, macs: 0.6, sources: 2, images: 32}
distill: {training: {steps: 4, batch_size: 16}}
"""
CODE = """
import widths
from sbf_dist.cifar import build_cifar

def net(num_classes):
    return build_cifar(f"cifar_resnet8_w{widths.FIRST}", num_classes)
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done up to the stage compress."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "mine.py").write_text(CODE)
    (folder / "widths.py").write_text("FIRST = 4\n")
    done = run_in_a_process(folder, "--until", "compress")
    assert done.returncode == 0, done.stderr
    return folder


def run_in_a_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.run(
        [SBF, "run", "tiny.yaml", *arguments],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def times(folder: Path) -> dict[str, int]:
    """When each network's weights were written."""
    weights = (folder / "runs" / "tiny" / "weights").glob("*.safetensors")
    return {path.stem: path.stat().st_mtime_ns for path in weights}


def result(folder: Path, stage: str) -> dict:
    return json.loads((folder / "runs" / "tiny" / "stages" / f"{stage}.json").read_text())


def test_code_of_a_network_that_is_edited_between_two_stages_is_named(folder: Path) -> None:
    (folder / "widths.py").write_text("FIRST = 5\n")
    refused = run_in_a_process(folder, "--until", "distill")
    (folder / "widths.py").write_text("FIRST = 4\n")
    assert refused.returncode == 2
    assert refused.stderr == (
        f"sbf: run folder {folder}/runs/tiny: teachers was done with another content of widths.py "
        "(code of teachers.1.model); give --again teachers (which repeats teachers, "
        "pseudo-labels) or another name (name=…)\n"
    )


def test_another_budget_is_reached_without_training_the_teachers_anew(
    folder: Path, sbf: Sbf, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = times(folder)
    assert result(folder, "compress")["read"]["compress.macs"] == 0.6
    assert "compress.macs" not in result(folder, "teachers")["read"]
    monkeypatch.chdir(folder)
    code, _, refused = sbf("run", "tiny.yaml", "--until", "compress", "compress.macs=0.8")
    assert code == 2
    assert (
        "compress was done with compress.macs = 0.6, the recipe says 0.8; give --again compress or "
        "another name (name=…)"
    ) in refused
    done = run_in_a_process(
        folder, "--until", "compress", "compress.macs=0.8", "--again", "compress"
    )
    assert done.returncode == 0, done.stderr
    assert "teachers: already done" in done.stdout
    assert "pseudo-labels: already done" in done.stdout
    after = times(folder)
    assert {name for name in before if before[name] != after[name]} == {"sbf-one-shot", "zeroed"}
    assert 0.6 < result(folder, "compress")["share"] <= 0.8


def test_in_a_moved_run_more_steps_for_one_training_concern_what_depends_on_it_alone(
    folder: Path, sbf: Sbf, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = times(folder)
    tracked = json.loads((folder / "runs" / "tiny" / "tracking.json").read_text())
    changes = ("compress.macs=0.8", "teachers.1.training.steps=6")
    monkeypatch.chdir(folder)
    _, _, refused = sbf("run", "tiny.yaml", "--until", "compress", *changes)
    assert "with teachers.1.training.steps = 4, the recipe says 6; give --again t" in refused
    assert "which resumes from its end" in refused
    (folder / "runs").rename(folder / "moved")
    done = run_in_a_process(
        folder, "--until", "compress", *changes, "--runs", "moved", "--again", "teachers"
    )
    assert done.returncode == 0, done.stderr
    assert "prepare: already done" in done.stdout
    assert "teachers.1.training.steps is 6 instead of 4: the training resumes" in done.stdout
    assert "resumed at step 4" in done.stdout
    assert "one: top-1" not in done.stdout
    assert "compress: already done" in done.stdout  # the student comes from the other teacher
    # A moved run is the same run.
    assert not (folder / "runs").exists()
    after = json.loads((folder / "moved" / "tiny" / "tracking.json").read_text())
    assert after["id"] == tracked["id"]
    assert "new runs are in experiment 'sbf-dist-2'" in done.stderr
    assert f"MLflow run {tracked['run_id']} (run) is not in sqlite" in done.stderr
    assert all(line.startswith("WARNING ") for line in done.stderr.splitlines()), done.stderr
    (folder / "moved").rename(folder / "runs")
    assert {name for name in before if before[name] != times(folder)[name]} == {"two"}
    assert result(folder, "pseudo-labels")["images"] == 1297
