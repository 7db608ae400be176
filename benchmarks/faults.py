"""Kill a training at random moments: does each run end, and with the same bits?

    python benchmarks/faults.py --json benchmarks/results/faults.json

One training is done without a fault. Then runs of the same recipe are started, and at a moment that
a seed decides a worker, the driver or Ray's raylet is killed (kill -9), until so many have been
killed. Where the driver dies, the same command is given again. A run is lost if its command ends
with another exit code than 0, or not within five minutes. Steps repeated: those done before a kill
that are not in the newest checkpoint at that moment; one that is finished just after the kill makes
it up to ten too many, and the number after it too few.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
NETWORK = ROOT / "benchmarks" / "faults_network.py"
VICTIMS = ("worker", "driver", "raylet")
NAME = "digits"
STAGE = "teachers"
TRAINING = "teacher-1"
PATIENCE = 300.0  # seconds
PROGRAM = "from launchers.cli import main; main()"


@dataclass
class Run:
    """A run of one short training, which can be started, watched and killed."""

    runs: Path
    steps: int = 150
    checkpoint_every: int = 10
    workers: int = 2
    pause: float = 0.03
    extra: list[str] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    def command(self) -> list[str]:
        """Return the command, always the same."""
        diary = self.runs / "diary"
        diary.mkdir(parents=True, exist_ok=True)
        training = {
            "steps": self.steps,
            "warmup": 5,
            "checkpoint_every": self.checkpoint_every,
            "log_every": 5,
        }
        arguments = {"diary": str(diary), "pause": self.pause, "pace": str(self.pace)}
        teacher = {
            "name": TRAINING,
            "model": f"{NETWORK}:make",
            "arguments": arguments,
            "training": training,
        }
        changes = {"teachers": [teacher], "workers.count": self.workers, "baselines": None}
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        recipe = str(ROOT / "recipes" / "digits.yaml")
        options = ["--runs", str(self.runs), "--until", STAGE]
        return [sys.executable, "-c", PROGRAM, "run", recipe, *options, *overrides, *self.extra]

    def start(self) -> None:
        """Give the command; what it prints is kept in `output`."""
        with self.log.open("a") as log:
            # A crash says where it was.
            added = {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
            environment = {**os.environ, **added}
            self.process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, text=True, cwd=ROOT, env=environment
            )

    @property
    def pace(self) -> Path:
        """The file that slows the training down while it is there; see faults_network.py."""
        return self.runs / "pace"

    @property
    def log(self) -> Path:
        return self.runs / "output.txt"

    @property
    def output(self) -> str:
        """What all starts have printed."""
        return self.log.read_text()

    @property
    def checkpoints(self) -> Path:
        return self.runs / NAME / "checkpoints" / STAGE

    def saved(self) -> int:
        """Return the step of the newest checkpoint, 0 if there is none."""
        step = "[0-9]" * 8
        found = self.checkpoints.glob(f"{TRAINING}-{step}/manifest.json")
        return max((int(p.parent.name.rpartition("-")[2]) for p in found), default=0)

    def passes(self) -> dict[str, int]:
        """Return how many steps each process has done that ever was a worker."""
        counts = {}
        for path in (self.runs / "diary").iterdir():
            text = path.read_text()
            counts[path.name] = int(text) if text else 0
        return counts

    def alive(self) -> bool:
        """Whether the command is still at work."""
        return self.process is not None and self.process.poll() is None

    def below(self, victim: str) -> list[psutil.Process]:
        """Return the processes of one kind, the oldest first; some may have ended by now."""
        assert self.process is not None
        driver = psutil.Process(self.process.pid)
        if victim == "driver":
            return [driver]
        wanted = {"worker": "RayTrainWorker", "raylet": "raylet/raylet"}[victim]
        found = []
        for process in driver.children(recursive=True):
            try:
                if wanted in " ".join(process.cmdline()[:1] or [process.name()]):
                    found.append((process.create_time(), process.pid, process))
            except psutil.NoSuchProcess:
                continue
        return [process for _, _, process in sorted(found)]

    def wait_for_step(self, step: int) -> bool:
        """Wait until the newest workers have done so many steps; False if the run ends before."""
        deadline = time.monotonic() + PATIENCE
        known = self.passes()
        while self.alive() and time.monotonic() < deadline:
            now = self.passes()
            if any(now[pid] - known.get(pid, 0) >= step for pid in now):
                return True
            time.sleep(0.02)
        return False

    def finish(self) -> int | None:
        """Return the exit code; None if the command does not end in time."""
        assert self.process is not None
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return None

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the trained weights."""
        return load_file(self.runs / NAME / "weights" / f"{TRAINING}.safetensors")

    def end(self) -> None:
        """Make sure that nothing is left of it."""
        if self.alive():
            assert self.process is not None
            processes = [p for kind in ("raylet", "driver") for p in self.below(kind)]
            for process in processes:
                process.kill()
            self.process.wait()


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights have the same names and bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def kill(run: Run, victim: str) -> int | None:
    """Kill one process of a kind; the step of the newest checkpoint. None: there is no such one."""
    processes = run.below(victim)
    if not processes:  # the run has just ended
        return None
    processes[-1].send_signal(signal.SIGKILL)
    if victim == "driver":
        run.finish()
    return run.saved()


def killed_runs(folder: Path, kills: int, seed: int, workers: int) -> Iterator[dict[str, object]]:
    """Kill so many processes, in as many runs as that takes, and compare what the runs end with.

    Yields the figures after each run.
    """
    moments = random.Random(seed)
    reference = Run(folder / "reference", workers=workers)
    reference.runs.mkdir(parents=True)
    reference.start()
    if reference.finish() != 0:
        raise RuntimeError(f"the run without a fault ended with an error:\n{reference.output}")
    victims = list(VICTIMS) * (kills // len(VICTIMS) + 1)
    moments.shuffle(victims)
    done: list[dict[str, object]] = []
    runs = lost = exact = 0
    while len(done) < kills:
        runs += 1
        run = Run(folder / f"run-{runs}", workers=workers)
        run.runs.mkdir()
        run.start()
        code: int | None = None
        started_at = 0
        while len(done) < kills and run.wait_for_step(moments.randint(5, run.steps // 2)):
            victim = victims[len(done)]
            known = run.passes()
            newest = max(known, key=lambda pid: (run.runs / "diary" / pid).stat().st_mtime)
            saved = kill(run, victim)
            if saved is None:
                break
            repeated = started_at + known[newest] - saved
            started_at = saved
            done.append({"run": runs, "killed": victim, "repeated": repeated, "saved": saved})
            print(
                f"{len(done)}/{kills}: run {runs}: {victim} killed, {repeated} steps to repeat",
                flush=True,
            )
            if victim == "driver":
                run.start()
        code = run.finish()
        run.end()
        ended = code == 0
        lost += not ended
        exact += ended and same_bits(run.weights(), reference.weights())
        if not ended:
            print(f"run {runs} ended with {code}:\n{run.output}")
        yield {
            "kills": len(done),
            "runs": runs,
            "lost_runs": lost,
            "exact": exact,
            "steps": reference.steps,
            "checkpoint_every": reference.checkpoint_every,
            "workers": workers,
            "steps_repeated_max": max((int(str(one["repeated"])) for one in done), default=0),
            "killed": {kind: sum(one["killed"] == kind for one in done) for kind in VICTIMS},
            "moments": list(done),
        }


def main() -> None:
    """Run the benchmark and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    machine = {"cpus": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__}
    origin = {"seed": given.seed, "date": str(date.today()), "machine": machine}
    with tempfile.TemporaryDirectory() as folder:
        for figures in killed_runs(Path(folder), given.kills, given.seed, given.workers):
            given.json.write_text(json.dumps(figures | origin, indent=1) + "\n")
            shown = ("kills", "runs", "lost_runs", "exact", "steps_repeated_max")
            print({key: figures[key] for key in shown}, flush=True)


if __name__ == "__main__":
    main()
