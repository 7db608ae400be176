"""What the version before has written is read as it is: folders of a run and of a comparison."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from launchers.comparison.summary import compare
from launchers.display import Display
from launchers.run.building import build_network
from launchers.run.earlier_defaults import as_begun
from launchers.run.folder import RunFolder
from launchers.run.networks import Networks
from launchers.run.stages import STAGES
from pipelines.index import DataIndex
from sbf_dist import compare_recipe, recipe
from sbf_dist.compression.cost import count
from sbf_dist.compression.plan import Plan
from sbf_dist.distill import pseudo_labels, stored_labels
from sbf_dist.export.saved import load_card, load_student
from sbf_dist.export.sbf_student import Student

BEFORE = Path(__file__).parent / "before"
SBF = Path(sys.executable).with_name("sbf")
SHAPE = (3, 12, 12)
Sbf = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    shutil.copytree(BEFORE / "run", tmp_path / "before")
    return RunFolder(tmp_path, "before")


@pytest.fixture
def networks(folder: RunFolder) -> Networks:
    as_it_was, notes = as_begun(recipe.load(BEFORE / "before.yaml"), folder)
    assert notes == [
        "distill.targets = stored and distill.label_weight = 0.5: this run keeps the defaults of "
        "the version that started it; use another name (name=…) for the current defaults"
    ]
    return Networks.of(as_it_was, folder)


def test_the_recipe_is_the_run_that_it_was(networks: Networks) -> None:
    before = json.loads(networks.folder.recipe.read_text())
    assert networks.recipe.identity() == before


def test_index_and_pseudo_labels_are_read(networks: Networks) -> None:
    index = DataIndex.load(networks.folder.index)
    assert {part: len(ids) for part, ids in index.parts.items()} == {
        "labelled": 50,
        "unlabelled": 1247,
        "validation": 500,
    }
    origin = pseudo_labels.origin(networks.recipe, index.digest, {"teacher-1": "not noted then"})
    stored = stored_labels.load(networks.folder.pseudo_labels, origin)
    assert len(stored) == 1297
    assert stored.classes.shape == stored.probabilities.shape == (1297, 3)
    assert stored.probabilities.dtype == np.float32
    assert stored.agreement is None
    np.testing.assert_allclose(
        stored.margin, stored.probabilities[:, 0] - stored.probabilities[:, 1]
    )


def test_networks_are_built_with_their_plans_and_weights(networks: Networks) -> None:
    for network in (networks.compressed, networks.one_shot, networks.student):
        module = build_network(network, 10, network.weights).eval()
        assert module(torch.zeros(1, *SHAPE)).isfinite().all()
        if network.plan is not None:
            assert count(module, SHAPE).macs == Plan.load(network.plan).macs_after


def test_the_student_gives_the_same_answers_as_its_exported_form(folder: RunFolder) -> None:
    student = load_student(folder.student)
    assert load_card(folder.student).top1 == pytest.approx(0.088)
    images = torch.randint(0, 256, (4, 12, 12, 3), dtype=torch.uint8)
    logits = student(((images / 255 - 0.5) / 0.5).permute(0, 3, 1, 2))
    portable = Student(str(folder.student / "student.onnx")).predict(images.numpy())
    torch.testing.assert_close(
        torch.from_numpy(portable["probabilities"]), logits.softmax(1).detach(), atol=1e-4, rtol=0
    )


def test_the_plans_are_shown(folder: RunFolder, sbf: Sbf) -> None:
    for place in (folder.root, folder.student, folder.round_plan(1)):
        code, out, err = sbf("plan", "show", place)
        assert code == 0, err
        assert "0.6" in out or "multiply-adds" in out


def test_a_comparison_is_as_it_was(tmp_path: Path) -> None:
    shutil.copytree(BEFORE / "comparison", tmp_path / "compared")
    rows = json.loads((tmp_path / "compared" / "comparison.json").read_text())["rows"]
    settings = compare_recipe.load(BEFORE / "compared.yaml")
    assert compare(settings, tmp_path, Display(Console(quiet=True)))["rows"] == rows


@pytest.mark.slow
def test_nothing_of_a_run_is_done_anew_and_a_change_is_refused_with_its_way_out(
    folder: RunFolder, sbf: Sbf
) -> None:
    command = ("run", BEFORE / "before.yaml", "--runs", folder.runs)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    again = subprocess.run(
        [SBF, *map(str, command)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    for stage in STAGES:
        assert f"{stage.name}: already done" in again.stdout
    code, _, err = sbf(*command, "compress.macs=0.8")
    assert code == 2
    assert err.count("\n") == 1
    assert (
        "before: compress was done with compress.macs = 0.6, the recipe says 0.8; give --again "
        "compress (which repeats compress, distill, evaluate, export) or another name"
    ) in err
