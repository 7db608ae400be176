"""A machine that will be taken away, on a real cluster of two nodes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.machine import available_cpus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(available_cpus() < 2, reason="two nodes need two CPUs"),
]


def test_workers_write_a_checkpoint_before_their_machine_goes_and_go_on_without_it(
    tmp_path: Path,
) -> None:
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[2])]),
        "RAY_AUTH_MODE": "disabled",
    }
    ended = subprocess.run(
        [sys.executable, str(here / "two_nodes.py"), str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    warnings = "\n".join(found["warnings"])
    assert "is being preempted: writing a checkpoint at the next step" in warnings
    assert "tiny: a machine is being preempted, once without a new checkpoint" in warnings
    seen = [json.loads(line) for line in (tmp_path / "0.jsonl").read_text().splitlines()]
    pids = list(dict.fromkeys(pid for pid, *_ in seen))
    assert len(pids) == 2
    last_before = max(step for pid, step, _ in seen if pid == pids[0])
    assert found["start"] >= last_before - 1  # nothing is done again but a step at most
