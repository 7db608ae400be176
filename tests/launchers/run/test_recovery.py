"""One run that meets every fault in turn, and must end with the bits of a run that met none."""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import pytest

from launchers.display import SECONDS_BETWEEN_LINES
from launchers.machine import available_cpus
from sbf_dist.tracking import journal

spec = importlib.util.spec_from_file_location(
    "faults", Path(__file__).parents[3] / "benchmarks" / "faults.py"
)
assert spec is not None
faults = importlib.util.module_from_spec(spec)
sys.modules["faults"] = faults  # dataclasses look there
assert spec.loader is not None
spec.loader.exec_module(faults)
TALK = "faults_network: a network is made"  # of what its network prints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(available_cpus() < 2, reason="two workers need two CPUs"),
]
STEPS = 120
BETWEEN = 14  # steps between two faults; a checkpoint is written every 10
PACE = f"{BETWEEN} 1.0"  # after these a step takes a second: faults have time to happen


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """A run without a fault."""
    run = faults.Run(tmp_path_factory.mktemp("whole"), steps=STEPS, pause=0.0)
    run.start()
    assert run.finish() == 0, run.output
    return run


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run through all faults; what was seen of it."""
    run = faults.Run(
        tmp_path_factory.mktemp("survived"),
        steps=STEPS,
        pause=0.0,
        extra=["workers.hang_timeout=20"],  # longer than a busy machine lets a process wait
    )
    run.pace.write_text(PACE)
    seen = SimpleNamespace(run=run, codes={}, saved={})

    def reach() -> None:
        assert run.wait_for_step(BETWEEN), run.output

    def ended(name: str) -> None:
        seen.codes[name], seen.saved[name] = run.finish(), run.saved()

    def end_by(signum: signal.Signals) -> None:
        run.start()
        reach()
        os.kill(run.process.pid, signum)
        ended(signum.name)

    disk = run.runs / faults.NAME
    disk.mkdir(parents=True)
    seen.small_disk = is_mounted(disk)
    try:
        run.start()
        reach()
        run.below("worker")[1].send_signal(signal.SIGKILL)
        reach()
        seen.frozen = run.below("worker")[-1]  # one of those before may not be gone yet
        seen.frozen.send_signal(signal.SIGSTOP)
        reach()
        faults.kill(run, "raylet")
        reach()
        if seen.small_disk:
            fill_the_disk(seen, ended)
        else:
            faults.kill(run, "driver")

        seen.truncated = run.checkpoints / f"{faults.TRAINING}-{run.saved():08d}"
        shard = next(seen.truncated.glob("deepspeed/state/*rank_1*optim*"))
        os.truncate(shard, 100)
        end_by(signal.SIGTERM)
        seen.killed = ends(run)
        end_by(signal.SIGINT)
        run.start()
        reach()
        faults.kill(run, "driver")
        run.pace.unlink()
        run.start()
        ended("end")
        yield seen
    finally:
        run.end()
        if seen.small_disk:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill_the_disk(seen: SimpleNamespace, ended: Callable[[str], None]) -> None:
    """Let the next checkpoint find no room; then make room again."""
    filler = seen.run.runs / faults.NAME / "filler"
    fill(filler)
    before = seen.run.saved()
    seen.run.pace.unlink()  # it ends by itself
    ended("full disk")
    seen.run.pace.write_text(PACE)
    assert seen.saved["full disk"] >= before
    filler.unlink()


def is_mounted(folder: Path) -> bool:
    """Make `folder` a disk of 16 MB, which this user may not be allowed to."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)]
    return subprocess.run(mount, check=False, capture_output=True).returncode == 0


def fill(path: Path) -> None:
    """Write to a file until its disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**12))


def ends(run) -> set[str]:
    """How the runs of MLflow have ended at last, as far as the run folder says so."""
    found = set()
    for folder in (run.runs / faults.NAME / "tracking").iterdir():
        entries = [entry for file in journal.files(folder) for entry, _ in journal.read(file)]
        last = max((entry for entry in entries if entry["kind"] == "end"), key=itemgetter("time"))
        found.add(last["status"])
    return found


OUR_LINES = (
    r"\[[12]/2\] (prepare|teachers)|  done in [\d.]+ s|"
    r"  \S+: 10 classes, 100 labelled, 1197 unlabelled, 500 validation|"
    rf"  {faults.TRAINING}: top-1 [\d.]+ %|"
    rf"  {faults.TRAINING} \(1 of 1\): \d+/{STEPS}  loss [\d.]+  \d+ images/s  \d+ s left|"
    r"  images: \d+/1797(  [\d.,]+/s  \d+ s left)?"
)


def test_the_terminal_has_our_lines_alone_and_progress_rarely(whole) -> None:
    lines = whole.output.splitlines()
    assert [line for line in lines if not re.fullmatch(OUR_LINES, line)] == []
    seconds = sum(float(line.split()[2]) for line in lines if line.startswith("  done in"))
    progress = [line for line in lines if re.search(r": \d+/\d+", line)]
    assert len(progress) <= seconds / SECONDS_BETWEEN_LINES


def test_what_libraries_print_is_in_the_runs_logs_of_workers_too(whole) -> None:
    logs = whole.runs / faults.NAME / "logs"
    driver = (logs / "libraries.log").read_text().splitlines()
    assert driver.count(TALK) >= 2  # as Python prints it, and as C++ does
    workers = (logs / "workers.log").read_text()
    names = re.findall(r"--- worker-\S+-(\d+)\.(err|out)", workers)
    assert {len({pid for pid, kind in names if kind == one}) for one in ("err", "out")} == {2}
    assert workers.count(TALK) >= 4


def test_it_ends_with_the_bits_of_a_run_without_a_fault(whole, survived) -> None:
    assert survived.codes["end"] == 0, survived.run.output
    assert faults.same_bits(whole.weights(), survived.run.weights())


def test_workers_and_raylet_are_started_again_with_one_line_each(survived) -> None:
    lines = [line for line in survived.run.output.splitlines() if "restarting the workers" in line]
    killed, stopped, raylet = lines
    assert "worker 1 died, once" in killed or "a worker died, once" in killed
    assert "hung" in stopped or "died" in stopped
    assert "Ray's raylet died" in raylet
    assert "logs/teachers-1.log" in killed
    assert not survived.frozen.is_running()


def test_a_full_disk_ends_the_run_with_its_cause_in_one_line(survived) -> None:
    if not survived.small_disk:
        pytest.skip("may not mount a small disk")
    assert survived.codes["full disk"] == 2, survived.run.output
    (line,) = [line for line in survived.run.output.splitlines() if "checkpoint of step" in line]
    assert "the disk is full; the previous checkpoint is intact" in line


def test_a_truncated_shard_is_passed_over_with_a_warning_that_names_both(survived) -> None:
    (line,) = [line for line in survived.run.output.splitlines() if "damaged" in line]
    assert str(survived.truncated) in line
    step = int(survived.truncated.name.rpartition("-")[2])
    assert line.endswith(f"resumes from {faults.TRAINING}-{step - 10:08d}")


def test_signals_write_a_checkpoint_at_the_next_step_and_say_how_to_go_on(survived) -> None:
    codes = {name: survived.codes[name] for name in ("SIGTERM", "SIGINT")}
    assert codes == {"SIGTERM": 143, "SIGINT": 130}, survived.run.output
    for name in codes:
        assert (
            f"sbf: stopped by {name}; run the same command again to resume" in survived.run.output
        )
    # The first went on from the checkpoint before the truncated one. Without a signal only every
    # tenth step is saved.
    step = int(survived.truncated.name.rpartition("-")[2])
    assert survived.saved["SIGTERM"] >= step - 10 + BETWEEN
    assert survived.saved["SIGINT"] >= survived.saved["SIGTERM"] + BETWEEN
    assert survived.killed == {"FINISHED", "KILLED"}  # the stage before, and what was going on


def test_no_traceback_is_shown_and_nothing_cut_is_left(survived) -> None:
    assert "Traceback" not in survived.run.output
    names = {path.name for path in survived.run.checkpoints.iterdir()}
    assert {name for name in names if name.startswith(".")} == set()
