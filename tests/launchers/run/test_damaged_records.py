"""Small files of a run that a full disk or a loss of power has cut: what is made anew of what."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from tiny_run import ALL, do, done, networks_of

from launchers.display import Display
from launchers.run import execution, work
from launchers.run.building import build_network
from launchers.run.earlier_defaults import as_begun
from launchers.run.networks import Networks
from launchers.run.sequence import open_folder
from sbf_dist.compression.calibration import Calibration
from sbf_dist.errors import UserError
from sbf_dist.weights import save_weights


@pytest.fixture
def run(tmp_path: Path) -> Networks:
    """A run of which all stages are done."""
    networks = networks_of(tmp_path)
    do(networks, *ALL)
    return networks


@pytest.mark.parametrize("content", ["", '{"read": {', "[]", "\x00" * 8])
def test_a_result_that_is_damaged_counts_as_not_there(run: Networks, content: str) -> None:
    path = run.folder.result("teachers")
    path.write_text(content)
    (line,) = open_folder(run, None)
    assert line.startswith(f"warning: {path} is damaged: ")
    assert line.endswith("; renamed to teachers.json.damaged, teachers makes it anew")
    assert done(run) == [name for name in ALL if name != "teachers"]
    assert path.with_name("teachers.json.damaged").read_text() == content
    assert all(teacher.weights.exists() for teacher in run.teachers)
    assert open_folder(run, None) == []


def test_a_change_of_the_recipe_is_seen_where_a_result_is_damaged(run: Networks) -> None:
    run.folder.result("compress").write_text("")
    other = networks_of(run.folder.runs, "compress.macs=0.25")
    with pytest.raises(UserError, match=r"compress was begun with compress.macs = 0\.5"):
        open_folder(other, None)
    open_folder(other, "compress")
    assert done(run) == ["prepare", "teachers", "pseudo-labels"]


@pytest.mark.parametrize("name", ["recipe.json", "read-files.json"])
def test_a_damaged_note_of_what_the_run_was_done_with_says_what_to_do(
    run: Networks, name: str
) -> None:
    path = run.folder.root / name
    path.write_text("")
    with pytest.raises(UserError) as caught:
        as_begun(run.recipe, run.folder)
        open_folder(run, None)
    assert str(caught.value) == (
        f"{path} is damaged: Expecting value: line 1 column 1 (char 0); if the recipe and its "
        "files are as they were, remove it and run the same command again; otherwise give another "
        "name (name=…)"
    )
    path.unlink()
    assert open_folder(run, None) == []
    assert done(run) == ALL


def test_a_result_that_is_read_without_a_run_says_who_makes_it_anew(run: Networks) -> None:
    path = run.folder.result("evaluate")
    path.write_text("")
    with pytest.raises(UserError, match=r"evaluate\.json is damaged: .*; `sbf run` makes it anew"):
        execution.show_results(Display(Console(quiet=True)), run.folder, "sqlite:///x", None)


@pytest.fixture
def compress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stage compress of a run with one teacher; its answer, and the lines that it says."""
    model = ("teachers.0.model=cifar_resnet8_w4", "compress.sources=2", "baselines=null")
    networks = networks_of(tmp_path, *model)
    torch.manual_seed(0)
    teacher = networks.compressed
    save_weights(build_network(teacher, 10, None), teacher.weights)
    images = Calibration.of(torch.randn(32, *teacher.input_shape))
    monkeypatch.setattr(work, "_calibration", lambda _: images)
    display = Display(Console(record=True, width=200))
    session = SimpleNamespace(
        recipe=networks.recipe,
        networks=networks,
        folder=networks.folder,
        num_classes=10,
        display=display,
    )
    log = SimpleNamespace(log_artifact=lambda *_: None, log_metrics=lambda *_: None)

    def perform() -> tuple[dict[str, Any], str]:
        answer = work.compress_teacher(cast("Any", session), cast("Any", log))
        return answer, display.console.export_text()

    perform.networks = networks  # type: ignore[attr-defined]
    return perform


def test_a_plan_whose_record_is_damaged_is_kept_with_its_networks(
    compress: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = compress()
    networks = compress.networks
    files = (networks.folder.plan, networks.one_shot.weights, networks.zeroed.weights)
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    with monkeypatch.context() as patch:
        patch.setattr(work, "make_student", lambda *_: pytest.fail("it was compressed again"))
        again, said = compress()
    assert again == first
    assert "plan.json and its networks are there: they are kept" in said
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before
    networks.one_shot.weights.write_bytes(b"")
    anew, said = compress()
    assert anew == first
    assert "they are kept" not in said
    assert networks.one_shot.weights.read_bytes() == before[1][0]
