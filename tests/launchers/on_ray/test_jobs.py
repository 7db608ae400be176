"""A run as a job of a real cluster: sent, followed, listed, ended; strangers are refused."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import sbf_dist
from launchers.on_ray.jobs import RUN

pytestmark = pytest.mark.slow
ROOT = Path(sbf_dist.__file__).parents[1]
STARTED_SECONDS = 240.0


def free_ports(count: int) -> list[str]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [str(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def head(token: str) -> Iterator[str]:
    """A Ray head that listens on loopback and asks for `token`; the address of its dashboard."""
    gcs, dashboard, agent, client = free_ports(4)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "SBF_DIST_EXTENSION": str(next((ROOT / "sbf_dist").glob("_C.*.so"))),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
        *("--node-ip-address", "127.0.0.1", "--port", gcs, "--num-cpus", "1"),
        *("--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard),
        *("--dashboard-agent-listen-port", agent, "--ray-client-server-port", client),
        *("--object-store-memory", str(100 * 2**20), "--disable-usage-stats"),
    ]
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="h") as folder:
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(
                [*command, "--temp-dir", f"{folder}/r"],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started = []
        try:
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            started = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(timeout=120)
            _, alive = psutil.wait_procs(started, timeout=10)
            for left in alive:
                left.send_signal(signal.SIGKILL)


def start_job(address: str, token: str, entrypoint: str, **values: object) -> None:
    """Start a job by HTTP: Ray's client keeps the first token that a process had.

    Waits until the head takes jobs.
    """
    request = urllib.request.Request(
        f"{address}/api/jobs/",
        data=json.dumps({"entrypoint": entrypoint, **values}).encode(),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    deadline = time.monotonic() + STARTED_SECONDS
    while True:
        try:
            urllib.request.urlopen(request, timeout=240).close()
        except (OSError, urllib.error.HTTPError):
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
        else:
            return


def sbf(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    program = "import sys; from launchers.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_run_is_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = secrets.token_hex(16)
    with head(token) as address:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
        start_job(address, token, "true")

        runs = tmp_path / "runs"
        first = sbf("submit", "recipes/digits.yaml", "--until", "prepare", "--runs", str(runs))
        assert first.returncode == 0, first.stdout + first.stderr
        assert "[1/1] prepare" in first.stdout
        assert "10 classes, 100 labelled" in first.stdout
        assert first.stdout.splitlines()[-1].endswith(": SUCCEEDED")
        assert (runs / "digits" / "stages" / "prepare.json").exists()

        job = first.stdout.splitlines()[-1].split()[1].rstrip(":")
        listed = sbf("jobs").stdout
        assert [line for line in listed.splitlines() if job in line and "SUCCEEDED" in line]
        assert "10 classes, 100 labelled" in sbf("logs", job).stdout
        unknown = sbf("logs", "nobody")
        assert unknown.returncode == 2
        assert unknown.stderr.startswith(f"sbf: job nobody: does not exist at {address}; there are")

        too_many = ["workers.count=2", "workers.start_timeout=1", "--until", "teachers"]
        few = sbf("submit", "recipes/digits.yaml", *too_many, "--runs", str(runs))
        assert few.returncode == 2, few.stdout + few.stderr
        there = "workers.count = 2: there are 1 CPUs and 0 GPUs, enough for 1 workers with"
        assert f"WARNING {there}" in few.stdout
        assert f"\nsbf: {there}" in few.stdout
        assert few.stdout.splitlines()[-1].endswith(": FAILED")

        start_job(address, token, "sleep 600", submission_id="long", metadata={RUN: "digits"})
        busy = sbf("submit", "recipes/digits.yaml", "--runs", str(runs))
        assert busy.returncode == 2
        assert "run digits is running in job long" in busy.stderr
        assert sbf("stop", "long").stdout == "job long: was asked to stop\n"

        monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
        refused = sbf("jobs")
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"sbf: cluster {address}: refuses the token")
        assert "another" not in refused.stderr
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=120)
