import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launchers.machine import available_cpus
from launchers.on_ray.local_ray import local_ray
from launchers.on_ray.temporary_folder import temporary_folder
from sbf_dist.errors import UserError

DRIVER = """
import sys, time
from launchers.on_ray.local_ray import local_ray
with local_ray(workers=1):
    print("up", flush=True)
    import os
    before = oct(os.stat(os.environ["TMPDIR"]).st_mode & 0o777)
    if len(sys.argv) > 1:
        time.sleep(600)
    import ray
    folder = os.environ["TMPDIR"]
    mode = oct(os.stat(folder).st_mode & 0o777)  # Ray opens its own folder, below, to everybody
    print(ray.get_runtime_context().get_node_id(), folder, before, mode, flush=True)
print("RAY_AUTH_TOKEN" in os.environ, flush=True)
"""


def test_more_workers_than_the_machine_has_cpus_are_refused() -> None:
    cpus = available_cpus()
    with pytest.raises(UserError) as caught, local_ray(workers=cpus + 7):
        pass
    assert str(caught.value) == (
        f"workers.count = {cpus + 7} with workers.cpus = 1: needs {cpus + 7} CPUs, this machine "
        f"has {cpus}; ask for fewer"
    )


def test_a_cluster_that_cannot_be_reached_is_reported() -> None:
    with (
        pytest.raises(UserError, match=r"Ray cluster 127\.0\.0\.1:1: cannot be reached"),
        local_ray(workers=1, address="127.0.0.1:1"),
    ):
        pass


@pytest.mark.slow
def test_a_ray_leaves_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], capture_output=True, text=True, timeout=600, check=True
    )
    up, node, clean = done.stdout.splitlines()
    folder = Path(node.split()[1])
    assert node.split()[2:] == ["0o700", "0o700"]
    assert (up, clean) == ("up", "False")
    assert not folder.exists()
    assert not [p for p in psutil.process_iter(["cmdline"]) if belongs(p, folder)]


STOPPED = """
import os, signal, threading, time
from pathlib import Path
from launchers.interruption import Interrupted, signals_raise
from launchers.on_ray.local_ray import local_ray

def stop():
    while "r" not in os.listdir(os.environ.get("TMPDIR", "/")):  # Ray's, which it begins with
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=stop, daemon=True).start()
try:
    with signals_raise(), local_ray(workers=1):
        print("up")
except Interrupted as signal:
    print(signal, os.environ.get("TMPDIR"))
"""


@pytest.mark.slow
def test_a_signal_while_ray_starts_is_ours_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOPPED],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert (done.returncode, done.stdout) == (0, f"SIGTERM {tmp_path}\n"), done.stderr


@pytest.mark.slow
def test_a_ray_dies_with_a_driver_that_was_killed_and_the_next_one_tidies_up() -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "stay"], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "up\n"
    environment = psutil.Process(driver.pid).children()[0].environ()
    left_over = Path(environment["TMPDIR"])
    assert left_over.exists()
    agents = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}  # they take a minute to notice
    started = psutil.Process(driver.pid).children(recursive=True)
    must_die = [process for process in started if process.name() not in agents]
    assert len(must_die) >= 2
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(must_die, timeout=120)
    assert alive == []
    for process in started:
        if process.is_running():
            process.kill()
    with temporary_folder() as folder:
        assert not left_over.exists()
    assert not folder.exists()


def belongs(process: psutil.Process, folder: Path) -> bool:
    return any(str(folder) in part for part in process.info["cmdline"] or [])
