"""launchers/slurm.sbatch, run as Slurm's first node would, with doubles of Slurm's programs."""

import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launchers" / "slurm.sbatch"
# srun runs its command here: --nodes, --ntasks and the like are written down and passed over.
SRUN = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
SCONTROL = 'if [ "$1 $2" = "show hostnames" ]; then printf "%s\\n" node1 node2 node3; fi'
GETENT = 'echo "127.0.1.1 STREAM node1"; echo "192.0.2.7 STREAM"'
SLEEP = 'if [ "$1" = 2 ]; then set -- 0.05; fi; exec /usr/bin/sleep "$@"'  # the script's own wait
# Ray's processes stay until they are asked to end; the head answers once it is up.
RAY = """
    stat -c "token %a $(cat "$RAY_AUTH_TOKEN_PATH" | wc -c)" "$RAY_AUTH_TOKEN_PATH" >> "$CALLED"
    if [ "$1" = start ]; then
        sleep 600 & trap 'kill $!; echo "ended $*" >> "$CALLED"; exit' TERM
        echo "up" >> "$CALLED"; wait
    fi
    if [ "$1" = health-check ]; then grep -q ^up "$CALLED"; fi
"""


class Allocation:
    """A checkout on three nodes that are all this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.called = folder / "called"
        self.checkout = folder / "checkout"
        (self.checkout / "launchers").mkdir(parents=True)
        (self.checkout / "launchers" / "nodes").symlink_to(ROOT / "launchers" / "nodes")
        self.programs = self.checkout / ".venv" / "bin"  # the first place to be looked at
        self.programs.mkdir(parents=True)
        for name, body in {
            "srun": SRUN, "scontrol": SCONTROL, "getent": GETENT, "ray": RAY, "sleep": SLEEP,
        }.items():  # fmt: skip
            self.program(name, body)

    def program(self, name: str, body: str) -> None:
        file = self.programs / name
        file.write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLED"\n{body}\n')
        file.chmod(0o755)

    def start(self) -> subprocess.Popen[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "CALLED": str(self.called),
            "SLURM_SUBMIT_DIR": str(self.checkout),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "node[1-3]",
            "SLURM_NNODES": "3",
            "SLURM_CPUS_PER_TASK": "8",
        }
        return subprocess.Popen(
            ["bash", SCRIPT, "recipe.yaml", "name=one two"],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def calls(self) -> list[str]:
        return self.called.read_text().splitlines() if self.called.exists() else []

    def wait_for(self, beginning: str) -> None:
        deadline = time.monotonic() + 120
        while not any(call.startswith(beginning) for call in self.calls()):
            assert time.monotonic() < deadline, self.calls()
            time.sleep(0.05)


@pytest.fixture
def allocation(tmp_path):
    return Allocation(tmp_path)


@pytest.mark.parametrize("code", [0, 2])
def test_a_run_starts_on_ray_with_a_token_and_everything_ends_with_it(allocation, code):
    allocation.program(
        "sbf",
        f"""until [ "$(grep -c ^up "$CALLED")" = 2 ]; do sleep 0.05; done
        echo "at $RAY_ADDRESS, arguments $#" >> "$CALLED"; exit {code}""",
    )
    process = allocation.start()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == code, printed
    calls = allocation.calls()
    ray = [call for call in calls if call.startswith("ray start")]
    assert len(ray) == 2  # the double of srun starts one process for the two other nodes
    assert "--head" in ray[0]
    assert "--node-ip-address=192.0.2.7 --port=6379" in ray[0]
    assert "--dashboard-host=127.0.0.1" in ray[0]
    assert "--temp-dir=/tmp/sbf-42" in ray[0]
    assert "--address=192.0.2.7:6379" in ray[1]
    others = next(call for call in calls if call.startswith("srun") and ray[1] in call)
    assert "--nodes=2 --ntasks-per-node=1 --nodelist=node2,node3" in others
    assert "at 192.0.2.7:6379, arguments 3" in calls  # "run", the recipe, and one with a space
    # A token of 32 random bytes, which only the user can read, and which is gone with the job.
    assert {call for call in calls if call.startswith("token")} == {"token 600 64"}
    assert list((allocation.folder / ".ray").iterdir()) == []
    assert sum(call.startswith("ended start") for call in calls) == 2
    assert calls[-1] == "srun --nodes=3 --ntasks-per-node=1 rm -rf /tmp/sbf-42"
    assert not any("requeue" in call for call in calls)


def wait_until_caught(process: subprocess.Popen[str], signum: signal.Signals) -> None:
    """Wait until the script has set its trap, which it does after it has started the run."""
    deadline = time.monotonic() + 120
    while True:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signum - 1) & 1:
            return
        assert time.monotonic() < deadline, status
        time.sleep(0.01)


@pytest.mark.parametrize(("sent", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_before_its_time_is_over_the_run_ends_in_order_and_is_queued_again(allocation, sent, again):
    allocation.program(
        "sbf",
        """sleep 600 &
        trap 'kill $!; sleep 0.5; echo "checkpoint written" >> "$CALLED"; exit 143' TERM
        until [ "$(grep -c ^up "$CALLED")" = 2 ]; do sleep 0.05; done
        echo "at work" >> "$CALLED"; wait""",
    )
    process = allocation.start()
    allocation.wait_for("at work")
    wait_until_caught(process, sent)
    process.send_signal(sent)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 143, printed
    calls = allocation.calls()
    assert "checkpoint written" in calls
    # The very last: Slurm ends the script with it.
    assert (calls[-1] == "scontrol requeue 42") is again
    assert sum("requeue" in call for call in calls) == again
    assert list((allocation.folder / ".ray").iterdir()) == []
    ends = [number for number, call in enumerate(calls) if call.startswith("ended start")]
    assert len(ends) == 2
    assert min(ends) > calls.index("checkpoint written")  # Ray is there until the run has ended


def test_a_head_that_does_not_start_ends_the_job_with_a_line(allocation):
    allocation.program("ray", "exit 1")
    allocation.program("sbf", "")
    process = allocation.start()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Ray's head on node1 has ended" in printed
    assert not any(call.startswith("sbf") for call in allocation.calls())


def test_slurm_gives_the_run_time_for_a_checkpoint_and_queues_it_after_a_loss():
    options = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in options
    assert "#SBATCH --signal=B:USR1@600" in options  # B: to the script, not to Ray's processes
    assert "#SBATCH --open-mode=append" in options
    assert not stat.S_IMODE(SCRIPT.stat().st_mode) & stat.S_IWOTH
