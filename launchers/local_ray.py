"""A Ray of this run's own, on this machine and its loopback address only; or a cluster's."""

import logging
import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from sbf_dist.errors import UserError

LOOPBACK = "127.0.0.1"
UNUSED_SERVICES = ("start_monitor", "start_log_monitor", "start_api_server")
OBJECT_STORE_BYTES = 256 * 2**20  # only Ray's own small objects pass through it

_FOLDER = "sbf-ray-"
# Ray makes Unix sockets in its folder, whose paths the kernel limits to 107 characters.
_LONGEST_TEMP = 15

# Read by Ray's processes when they start.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    # Its name tells what it is usually for; at 0, Ray takes 127.0.0.1 for the address of this
    # node, and everything listens there alone. An explicit node address of 127.0.0.1 is undone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_enable_core_worker_task_event_to_gcs": "0",
    "RAY_event_stats": "0",
    # Ray Train's processes have an environment of their own, which prestarted ones cannot take.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A machine that is busy with other work answers late: only after minutes is it taken for dead.
    "RAY_health_check_failure_threshold": "30",
}


def check_machine(workers: int, cpus_per_worker: int, gpus_per_worker: float = 0) -> None:
    """UserError if this machine has not the CPUs and GPUs that the workers ask for."""
    if workers < 1:
        raise UserError(f"workers.count = {workers}: must be at least 1")
    if cpus_per_worker < 1:
        raise UserError(f"workers.cpus = {cpus_per_worker}: must be at least 1")
    cpus = available_cpus()
    if workers * cpus_per_worker > cpus:
        raise UserError(
            f"workers.count = {workers} with workers.cpus = {cpus_per_worker}: needs "
            f"{workers * cpus_per_worker} CPUs, this machine has {cpus}; ask for fewer"
        )
    gpus = available_gpus() if gpus_per_worker else 0
    if workers * gpus_per_worker > gpus:
        raise UserError(
            f"workers.count = {workers} with workers.gpus = {gpus_per_worker:g}: needs "
            f"{workers * gpus_per_worker:g} GPUs, this machine has {gpus}; ask for fewer, or for 0"
        )


def available_cpus() -> int:
    """The CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def available_gpus() -> int:
    """The GPUs that PyTorch sees."""
    import torch

    return torch.cuda.device_count()


def runs_locally() -> bool:
    """Whether the Ray that this process has joined is one of local_ray's own."""
    import ray

    return ray.util.get_node_ip_address() == LOOPBACK


@contextmanager
def local_ray(
    workers: int,
    cpus_per_worker: int = 1,
    gpus_per_worker: float = 0,
    *,
    address: str | None = None,
) -> Iterator[None]:
    """Ray for `workers` workers while the context lasts.

    With `address` (or RAY_ADDRESS in the environment) that cluster is joined and left again.
    Without, a Ray is started that only this process uses: it listens on 127.0.0.1, asks for a
    random token that is in nobody's file, keeps its files in a folder that is removed at the end,
    and dies with this process, even by kill -9 (within seconds, but for two idle agents that take a
    minute to notice). A Ray that runs on this machine is never joined.

    UserError: this machine is too small (see check_machine), or the cluster cannot be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None and address != "local":
        with _joined(address):
            yield
        return
    check_machine(workers, cpus_per_worker, gpus_per_worker)
    environment = {
        **_QUIET,
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Programs of the virtual environment for workers when it is not activated.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    with _temporary_folder() as folder, _environment({**environment, "TMPDIR": str(folder)}):
        import ray

        try:
            with _as_small_as_can_be():
                ray.init(
                    address="local",
                    num_cpus=workers * cpus_per_worker,
                    num_gpus=math.ceil(workers * gpus_per_worker),
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(folder),
                )
            assert runs_locally(), f"Ray listens at {ray.util.get_node_ip_address()}"
            yield
        finally:
            ray.shutdown()


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder for the files of Ray and its workers, removed at the end.

    Folders of processes that could not do so, because they were killed, are removed before.
    """
    base = Path(tempfile.gettempdir())
    if len(str(base)) > _LONGEST_TEMP:
        base = Path("/tmp")
    for left in base.glob(f"{_FOLDER}*-*"):
        pid = left.name.removeprefix(_FOLDER).partition("-")[0]
        if pid.isdigit() and left.stat().st_uid == os.getuid() and not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _as_small_as_can_be() -> Iterator[None]:
    """Start none of Ray's processes that a run of one machine has no use for; loopback only.

    The autoscaler's monitor, the log monitor and the API server cost 190 MB and five seconds.
    ray.init has no switch for them; where Ray renames these methods they are started again.
    What Ray has read from the environment at an import before now is read again.
    """
    import ray
    from ray._private.node import Node
    from ray._raylet import (  # type: ignore[attr-defined]
        AuthenticationTokenLoader,
    )
    from ray._raylet import Config as RayletConfig  # type: ignore[attr-defined]

    AuthenticationTokenLoader.instance().reset_cache()
    RayletConfig.initialize("")
    constants = ray._private.ray_constants
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(constants, "ENABLE_RAY_CLUSTER", False))
        for method in UNUSED_SERVICES:
            if hasattr(Node, method):
                stack.enter_context(mock.patch.object(Node, method, _start_nothing))
        yield


def _start_nothing(node: Any, **_: Any) -> None:
    node._webui_url = None


@contextmanager
def _joined(address: str) -> Iterator[None]:
    _knock(address)
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UserError(f"Ray cluster {address}: cannot be reached: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """UserError if nobody listens at `address`: Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto", or a form that Ray judges
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"Ray cluster {address}: cannot be reached: {error}") from error


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
