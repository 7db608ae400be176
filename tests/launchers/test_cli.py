"""The `sbf` command as a user meets it: what it says and what it leaves.

A start costs seconds: one command of each kind is a real process, all others run in this one.
"""

import fcntl
import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from launchers import cli
from launchers.commands import run as run_command
from launchers.places import locked
from launchers.run import execution
from launchers.run.folder import RunFolder
from sbf_dist.errors import UserError

SBF = Path(sys.executable).with_name("sbf")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "80",
    "CUDA_HOME": "/usr",  # a toolkit, of which PyTorch warns where there is no GPU
}
RECIPE = """
name: tiny
data: {source: digits, image_size: 16}
teachers: [{name: one, model: cifar_resnet8, training: {steps: 10}}]
compress: {teacher: one, macs: 0.5}
distill: {training: {steps: 10}}
"""
MANY_WORKERS = [
    "workers.count=1024",
    "teachers.0.training.batch_size=1024",
    "distill.training.batch_size=1024",
]


@dataclass(frozen=True)
class Answer:
    """What a command has said, and what it has changed in the user's folder."""

    code: int
    stdout: str
    stderr: str
    changed: set[str]


def content(folder: Path) -> set[str]:
    return {f"{p.relative_to(folder)} {p.stat().st_mtime_ns}" for p in folder.rglob("*")}


def write_images(root: Path, **classes: int) -> None:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20), (10 * i, 0, 0)).save(root / name / f"{i}.png")


def prepare(folder: Path) -> None:
    """Fill a folder of a user's: a recipe, images with faults, a run of another recipe."""
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "empty").mkdir()
    write_images(folder / "gap", ant=3, bee=0, cow=3)
    write_images(folder / "few", ant=9, bee=4)
    (folder / "runs" / "tiny").mkdir(parents=True)
    (folder / "runs" / "tiny" / ".lock").touch()
    other = folder / "runs" / "other"
    (other / "stages").mkdir(parents=True)
    (other / ".lock").touch()
    (other / "recipe.json").write_text('{"name": "other", "seed": 77}')
    (other / "stages" / "prepare.json").write_text("{}")


def folder_of(name: str) -> list[str]:
    return ["run", "tiny.yaml", "data.source=folder", f"data.root={name}", "data.validation=2"]


COMMANDS = {
    "help": ["--help"],
    "help of run": ["run", "--help"],
    "missing recipe": ["run", "nowhere.yaml"],
    "unknown key": ["run", "tiny.yaml", "compress.mac=0.5"],
    "unknown stage": ["run", "tiny.yaml", "--until", "distil"],
    "budget": ["run", "tiny.yaml", "compress.macs=1.5"],
    "unknown model": ["run", "tiny.yaml", "teachers.0.model=timm:resnet5O"],
    "too many workers": ["run", "tiny.yaml", *MANY_WORKERS],
    "missing data": folder_of("nowhere"),
    "empty data": folder_of("empty"),
    "class without image": folder_of("gap"),
    "class with too few labels": [*folder_of("few"), "data.labelled_per_class=5"],
    "other recipe": ["run", "tiny.yaml", "name=other"],
    # Also of a recipe that is meant for another machine.
    "dry run": [*folder_of("nowhere"), *MANY_WORKERS, "--dry-run"],
}


# Which of them are processes of their own: help, a mistake that is found before and one that is
# found after what takes long is imported, and work.
PROCESSES = {"help", "unknown key", "other recipe", "dry run"}


def in_a_process(arguments: list[str], folder: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [SBF, *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def here(arguments: list[str], folder: Path) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("COLUMNS", "80")
        patch.setattr(sys, "argv", ["sbf", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
    return left.value.code or 0, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    template = tmp_path_factory.mktemp("template")
    prepare(template)

    def ask(name: str) -> Answer:
        folder = tmp_path_factory.mktemp("user") / "mine"
        shutil.copytree(template, folder)
        before = content(folder)
        run = in_a_process if name in PROCESSES else here
        return Answer(*run(COMMANDS[name], folder), content(folder) ^ before)

    return {name: ask(name) for name in COMMANDS}


@pytest.mark.parametrize("name", ["help", "help of run"])
def test_help_is_plain_text_of_eighty_columns(answers, name):
    answer = answers[name]
    assert (answer.code, answer.stderr, answer.changed) == (0, "", set())
    assert answer.stdout.isascii()
    assert max(map(len, answer.stdout.splitlines())) <= 80
    assert "..." not in answer.stdout.replace("[KEY=VALUE]...", "").replace("[ARGS]...", "")


def test_help_says_what_this_is_and_how_to_begin(answers):
    text = " ".join(answers["help"].stdout.split())
    assert "Usage: sbf" in text
    assert "CNNs at half the cost" in text
    assert "sbf run recipes/digits.yaml" in text
    assert re.search(r"run\s+Run a recipe: from images to an exported student\.", text)


def test_help_of_run_explains_every_argument_and_stage(answers):
    text = answers["help of run"].stdout
    assert re.search(r"Usage: sbf run \[OPTIONS\] \S*RECIPE\S* \[KEY=VALUE\]\.\.\.", text)
    for option in ("--runs", "--until", "--again", "--dry-run", "--help"):
        line = text[text.index(f"  {option}") :].removeprefix(f"  {option}")
        assert re.match(r"( <[^>]+>)?\s+[A-Z][a-z ,;]+", line), option
    for stage in run_command.StageName:
        assert stage.value in text
    assert "resumes from the last checkpoint" in " ".join(text.split())
    assert "distill.training.steps=200" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing recipe", "recipe nowhere.yaml does not exist"),
        (
            "unknown key",
            "recipe tiny.yaml: compress.mac is not a known key; did you mean 'macs'?",
        ),
        ("unknown stage", "Invalid value for '--until': 'distil' is not one of 'prepare', 'teach"),
        ("budget", "recipe tiny.yaml: compress.macs = 1.5 must be a share in (0, 1]"),
        ("unknown model", "model 'timm:resnet5O' is unknown; did you mean 'resnet50'?"),
        ("too many workers", "workers.count = 1024 with workers.cpus = 1: needs 1024 CPUs, this"),
        ("missing data", "/mine/nowhere: is not a folder"),
        ("empty data", "/mine/empty: is empty; it should hold one folder a class"),
        ("class without image", "/mine/gap: the class 'bee' has no image"),
        ("class with too few labels", "labelled_per_class 5: the class 'bee' of "),
        ("other recipe", "/runs/other: prepare was done with "),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_nothing_is_written(answers, name, message):
    answer = answers[name]
    assert answer.code == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith("sbf: ")
    assert answer.stderr.count("\n") == 1
    assert answer.stderr.endswith("\n")
    assert message in answer.stderr
    # The lock is a file of the run's folder, which was there before.
    assert all("/.lock " in change for change in answer.changed), answer.changed


def test_a_run_of_another_recipe_names_the_first_difference_and_the_ways_out(answers):
    assert re.search(
        r"done with seed = 77, the recipe says 0; give --again prepare or .*name=",
        answers["other recipe"].stderr,
    )


def test_a_dry_run_says_what_would_be_done_and_does_nothing(answers):
    answer = answers["dry run"]
    assert (answer.code, answer.stderr, answer.changed) == (0, "", set())
    assert re.search(r"recipe tiny is valid \([0-9a-f]{12}\)", answer.stdout)
    # Multiply-adds, parameters, steps, images of a step.
    assert re.search(r"one +[\d.]+ +[\d.]+ +10 +1,024 +labels", answer.stdout)
    assert re.search(r"sbf-distilled +[\d.]+ +[\d.]+ +10 +1,024 +live", answer.stdout)


def test_a_run_folder_in_use_is_refused_by_a_second_process(tmp_path):
    prepare(tmp_path)
    before = content(tmp_path)
    with (tmp_path / "runs" / "tiny" / ".lock").open("r") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, error = in_a_process(["run", "tiny.yaml"], tmp_path)
    assert code == 2
    assert error.count("\n") == 1
    assert "/runs/tiny is in use by another sbf run" in error
    assert {change for change in content(tmp_path) ^ before if "/.lock " not in change} == set()


# --- in this process -----------------------------------------------------------------------------


@pytest.fixture
def sbf(tmp_path, monkeypatch, sbf):
    """Run the command line in a user's folder; returns exit code, stdout and stderr."""
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    return sbf


def test_without_arguments_the_help_is_shown(sbf):
    assert sbf() == sbf("--help")
    assert sbf()[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument 'RECIPE'"),
        (["rum"], "No such command 'rum'. Did you mean 'run'?"),
        (["run", "tiny.yaml", "--untill", "x"], "No such option: --untill"),
        (["run", "tiny.yaml", "--until"], "Option '--until' requires an argument"),
        (["run", "tiny.yaml", "--again", "all"], "'all' is not one of 'prepare', 'teachers'"),
        (["run", "tiny.yaml", "--price", "5"], "--price 5.0: needs --dry-run"),
        (["run", "tiny.yaml", "--machine", "g6"], "--machine g6: needs --dry-"),
        (["run", "tiny.yaml", "--dry-run", "--machine", "g6"], "--machine g6 is not known; p5.48x"),
        (["run", "tiny.yaml", "steps"], "override 'steps' must look like"),
        (["run", "."], "recipe . is not YAML: it is a folder"),
        (["run", "tiny.yaml", "workers.gpus=9"], "needs 9 GPUs, this machine has"),
        (["run", "tiny.yaml", "teachers.0.name=zeroed", "compress.teacher=zeroed"],
         "teachers.0.name = 'zeroed' must not be one of ensemble, dense-labels, zeroed"),
        ([*folder_of("few"), "data.validation=null"], "has no val folder; set validation"),
        ([*folder_of("few"), "data.validation=99"], "has only 13 images to train on"),
    ],
)  # fmt: skip
def test_usage_errors_are_one_line_as_well(sbf, arguments, message):
    code, out, err = sbf(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("sbf: ")
    assert err.count("\n") == 1
    assert message in err


def test_what_is_no_mistake_of_the_users_keeps_its_traceback(sbf, monkeypatch):
    def bug(*_, **__):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(run_command, "check_models", bug)
    monkeypatch.setattr(sys, "argv", ["sbf", "run", "tiny.yaml"])
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.main()


def test_a_run_that_is_interrupted_ends_with_130(sbf, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(execution, "execute", interrupted)
    assert sbf("run", "tiny.yaml")[0] == 130


def test_stages_are_passed_on_and_runs_become_absolute(sbf, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(execution, "execute", lambda *given: seen.append(given))
    assert sbf("run", "tiny.yaml", "seed=3", "--runs", "here", "--until", "compress",
               "--again", "teachers")[0] == 0  # fmt: skip
    recipe, folder, until, again, _ = seen[0]
    assert recipe.seed == 3
    assert folder == RunFolder(tmp_path / "here", "tiny")
    assert (until, again) == ("compress", "teachers")
    assert not (tmp_path / "here").exists()


def test_images_that_are_indexed_already_need_not_be_there(sbf, monkeypatch):
    monkeypatch.setattr(execution, "execute", lambda *_: None)
    done = Path("runs/tiny/stages/prepare.json")
    done.parent.mkdir()
    done.write_text("{}")
    assert sbf(*folder_of("nowhere"))[0] == 0
    assert sbf(*folder_of("nowhere"), "--again", "compress")[0] == 0
    assert sbf(*folder_of("nowhere"), "--again", "prepare")[0] == 2


def test_a_lock_is_held_once_and_given_back(tmp_path):
    folder = RunFolder(tmp_path, "tiny")
    folder.root.mkdir()
    with (
        locked(folder.root, "run"),
        pytest.raises(UserError, match="in use by another sbf run"),
        locked(folder.root, "run"),
    ):
        pass
    with locked(folder.root, "run"):
        pass


def test_the_stages_of_the_command_line_are_those_that_are_done():
    from launchers.run.stages import STAGES

    assert [stage.value for stage in run_command.StageName] == [stage.name for stage in STAGES]
