"""Ray without unused processes: on the known version alone, and with the same result."""

import subprocess
import sys
import threading

import pytest

from launchers.on_ray import unused_services

DRIVER = """
import json, sys, tempfile
from pathlib import Path
import psutil
from launchers.on_ray import unused_services
unused_services.WRITTEN_FOR = sys.argv[1] or unused_services.WRITTEN_FOR
from launchers.on_ray.local_ray import local_ray

def work(config):
    import torch.distributed as dist
    return {"sum": config["a"] + config["b"], "ranks": dist.get_world_size()}

with local_ray(workers=1):
    from launchers.on_ray import attempts
    from launchers.on_ray.worker_group import KeptWorkers
    from sbf_dist.recipe import Workers
    import ray
    with tempfile.TemporaryDirectory() as folder:
        storage, logs = Path(folder), Path(folder, "logs")
        with KeptWorkers(Workers()) as kept:
            result = attempts.run_workers(
                work, {"a": 2, "b": 3}, name="work", storage=storage, logs=logs, kept=kept
            )
    children = psutil.Process().children(recursive=True)
    # process_iter leaves None where a process has ended in the meantime
    found = psutil.process_iter(["pid", "cmdline"])
    pids = {child.pid for child in children}
    commands = [" ".join(p.info["cmdline"] or ()) for p in found if p.pid in pids]
    names = ("monitor.py", "log_monitor.py", "dashboard.py")
    services = [name for name in names if any(f"/{name}" in command for command in commands)]
    print(json.dumps({"result": result, "services": services,
                      "address": ray.util.get_node_ip_address()}))
"""


def answer(version: str) -> dict:
    import json

    done = subprocess.run(
        [sys.executable, "-c", DRIVER, version],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_this_ray_is_the_version_that_it_was_written_for() -> None:
    """Where this fails, measure again what is saved with the new Ray, and look at its parts."""
    assert unused_services.is_known_version()


def test_what_is_left_out_is_there_to_be_left_out() -> None:
    from ray._private import worker
    from ray._private.node import Node
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    assert all(hasattr(Node, method) for method in unused_services.SERVICES)
    assert hasattr(worker, unused_services.MESSAGES)
    assert hasattr(TorchTrainer, "_initialize_and_run_controller")
    for method in unused_services.REQUESTS_FOR_NODES:
        assert hasattr(FixedScalingPolicy, method)


def test_another_version_of_ray_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.node import Node
    from ray.train.torch import TorchTrainer

    monkeypatch.setattr("ray.__version__", "99.1.0")
    before = {method: getattr(Node, method) for method in unused_services.SERVICES}
    with unused_services.services_left_out():
        assert {method: getattr(Node, method) for method in before} == before
    trainer = unused_services.trainer_class(on_one_machine=True, leave=threading.Event())
    assert trainer is TorchTrainer


@pytest.mark.slow
def test_on_the_known_version_services_are_left_out_and_on_another_the_result_is_the_same() -> None:
    small, plain = answer(""), answer("99.1")
    assert small["services"] == []
    assert set(plain["services"]) == {"monitor.py", "log_monitor.py", "dashboard.py"}
    assert small["result"] == plain["result"] == {"sum": 5, "ranks": 1}
    assert small["address"] == plain["address"] == "127.0.0.1"
