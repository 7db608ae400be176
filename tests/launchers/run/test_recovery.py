"""Runs that are killed: what a user does then is to give the same command again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
SBF = Path(sys.executable).with_name("sbf")
SHORT = [
    "teachers.0.training.steps=6",
    "teachers.0.training.warmup=1",
    "teachers.0.model=cifar_resnet8",
    "teachers.1.training.steps=6",
    "teachers.1.training.warmup=1",
    "teachers.1.model=cifar_resnet8",
    "compress.images=64",
    "compress.sources=2",
    "distill.training.steps=120",
    "distill.training.checkpoint_every=10",
    "distill.training.log_every=5",
    "baselines=null",
]
pytestmark = pytest.mark.slow


def command(runs: Path, *extra: str) -> list[str]:
    return [str(SBF), "run", "recipes/digits.yaml", "--runs", str(runs), *SHORT, *extra]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done up to the stage before distill."""
    folder = tmp_path_factory.mktemp("runs")
    subprocess.run(
        command(folder, "--until", "compress"), cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    return folder


@pytest.fixture
def started(runs: Path) -> Iterator[subprocess.Popen[str]]:
    """The stage distill at work, with a checkpoint that Ray's controller has taken note of.

    A checkpoint is in the storage a while before the controller looks at its workers again, on a
    busy machine a long one; a worker that dies in between goes on from the checkpoint before.
    """
    subprocess.run(command(runs, "--until", "compress", "--again", "distill"), cwd=ROOT, check=True)
    process = subprocess.Popen(
        command(runs, "--until", "distill"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 300  # a busy machine
        while not noted_checkpoints(runs):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no checkpoint within five minutes"
            time.sleep(0.1)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def checkpoints(runs: Path) -> Iterator[Path]:
    return (runs / "digits" / "checkpoints" / "distill").glob("checkpoint_*/manifest.json")


def noted_checkpoints(runs: Path) -> list[str]:
    """The checkpoints that Ray would go on from, as its controller keeps them on the disk."""
    noted = runs / "digits" / "checkpoints" / "distill" / "checkpoint_manager_snapshot.json"
    try:
        results = json.loads(noted.read_text())["checkpoint_results"]
    except (FileNotFoundError, json.JSONDecodeError):  # not there yet, or being written
        return []
    return [result["checkpoint_dir_name"] for result in results]


def result(runs: Path) -> dict:
    stage = json.loads((runs / "digits" / "stages" / "distill.json").read_text())
    return stage["trainings"]["sbf-distilled"]


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The two processes that train: those that use the most memory below the driver."""
    below = psutil.Process(process.pid).children(recursive=True)
    names = [p for p in below if "RayTrainWorker" in " ".join(p.cmdline())]
    assert len(names) == 2, [p.cmdline() for p in below]
    return names


def test_a_killed_worker_is_replaced_and_the_stage_goes_on_from_its_checkpoint(
    runs: Path, started: subprocess.Popen[str]
) -> None:
    workers_of(started)[1].send_signal(signal.SIGKILL)

    output, _ = started.communicate(timeout=180)

    assert started.returncode == 0, output
    assert result(runs)["from_step"] >= 10
    assert result(runs)["steps"] == 120


def test_a_killed_driver_leaves_a_run_that_the_same_command_finishes_from_its_checkpoint(
    runs: Path, started: subprocess.Popen[str]
) -> None:
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    assert not (runs / "digits" / "stages" / "distill.json").exists()

    again = subprocess.run(
        command(runs, "--until", "distill"), cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert again.returncode == 0, again.stdout + again.stderr
    assert "compress: done before" in again.stdout
    assert "resumed at step" in again.stdout
    assert result(runs)["from_step"] >= 10
    assert result(runs)["steps"] == 120


def test_a_checkpoint_with_a_missing_shard_is_refused_in_one_line_that_names_it(
    runs: Path, started: subprocess.Popen[str]
) -> None:
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    for manifest in checkpoints(runs):
        shard = next(manifest.parent.glob("deepspeed/state/*rank_1*optim*"))
        shard.unlink()

    again = subprocess.run(
        command(runs, "--until", "distill"), cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert again.returncode == 2, again.stdout + again.stderr
    assert len(again.stderr.strip().splitlines()) == 1, again.stderr
    assert shard.name in again.stderr
    assert "missing" in again.stderr
