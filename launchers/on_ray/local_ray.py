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
from contextlib import contextmanager
from pathlib import Path

from launchers.machine import check_machine
from launchers.on_ray import unused_services
from sbf_dist.errors import UserError

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 256 * 2**20  # only Ray's own small objects pass through it

_FOLDER_PREFIX = "sbf-ray-"
# Ray makes Unix sockets in its folder, whose paths the kernel limits to 107 characters.
_MAX_BASE_LENGTH = 15

# Read by Ray when it is imported, and by its processes when they start.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    # The name says what it is usually for; at 0, Ray takes 127.0.0.1 for the address of this node,
    # and everything listens there alone. Ray replaces an explicit node address of 127.0.0.1.
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
        **_RAY_ENVIRONMENT,
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Programs of the virtual environment for workers when it is not activated.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    with _temporary_folder() as folder, _environment({**environment, "TMPDIR": str(folder)}):
        if "ray" in sys.modules:
            unused_services.read_environment_again()
        import ray

        try:
            with unused_services.services_left_out():
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
            if not runs_locally():
                raise RuntimeError(
                    f"Ray listens at {ray.util.get_node_ip_address()} instead of {LOOPBACK}: it "
                    "was imported before its environment was set"
                )
            yield
        finally:
            ray.shutdown()


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder for the files of Ray and its workers, removed at the end.

    Folders of processes that could not do so, because they were killed, are removed before.
    """
    base = Path(tempfile.gettempdir())
    if len(str(base)) > _MAX_BASE_LENGTH:
        base = Path("/tmp")
    for old in base.glob(f"{_FOLDER_PREFIX}*-*"):
        pid = old.name.removeprefix(_FOLDER_PREFIX).partition("-")[0]
        if pid.isdigit() and old.stat().st_uid == os.getuid() and not Path("/proc", pid).exists():
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}{os.getpid()}-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _joined(address: str) -> Iterator[None]:
    _check_listening(address)
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UserError(f"Ray cluster {address}: cannot be reached: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_listening(address: str) -> None:
    """UserError if nobody listens at `address`: Ray would go on trying for minutes."""
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
