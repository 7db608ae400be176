"""A Ray of this run's own, on this machine and its loopback address only; or a cluster's."""

import logging
import math
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from launchers.interruption import held_back
from launchers.machine import workers_here
from launchers.on_ray import unused_services
from launchers.on_ray.printed import Printed
from launchers.on_ray.temporary_folder import temporary_folder
from sbf_dist.errors import UserError

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 256 * 2**20  # only Ray's own small objects pass through it
GCS, RAYLET = "gcs_server", "raylet"

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
    """Whether the Ray that this process uses is one that local_ray has started for it alone."""
    return bool(_own)


@contextmanager
def local_ray(
    workers: int,
    cpus_per_worker: int = 1,
    gpus_per_worker: float = 0,
    *,
    most: int | None = None,
    address: str | None = None,
    output: Path | None = None,
) -> Iterator[None]:
    """Ray for `workers` workers, or up to `most`, while the context lasts.

    With `address` (or RAY_ADDRESS in the environment) that cluster is joined and left again.
    Without, a Ray is started that only this process uses: it listens on 127.0.0.1, asks for a
    random token that is in nobody's file, keeps its files in a folder that is removed at the end,
    and dies with this process, even by kill -9 (within seconds, but for two idle agents that take a
    minute to notice). A Ray that runs on this machine is never joined.

    With `output`, nothing that workers print is lost: a cluster's is printed by this process, what
    those of a Ray of its own print is appended to that file.

    UserError: this machine is too small (see check_machine), or the cluster cannot be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None and address != "local":
        with _joined(address, with_output=output is not None):
            yield
        return
    count = workers_here(workers, most or workers, cpus_per_worker, gpus_per_worker)
    environment = {
        **_RAY_ENVIRONMENT,
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Programs of the virtual environment for workers when it is not activated.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    with temporary_folder() as folder, _environment({**environment, "TMPDIR": str(folder)}):
        if "ray" in sys.modules:
            unused_services.read_environment_again()
        # Ray opens its folder to everybody; the folder around it is ours alone.
        own = _OwnRay(
            count * cpus_per_worker,
            math.ceil(count * gpus_per_worker),
            folder / "r",
            None if output is None else Printed(output),
        )
        try:
            own.start()
            _own.append(own)
            yield
        finally:
            _own.clear()
            own.end()


@dataclass
class _OwnRay:
    """The Ray that this process has started."""

    cpus: int
    gpus: int
    folder: Path
    printed: Printed | None
    imported: bool = False

    def start(self) -> None:
        with held_back():  # Ray's own handlers of SIGTERM exit with 15, or abort with a stack
            self._start()

    def _start(self) -> None:
        import ray

        self.imported = True
        with unused_services.services_left_out():
            ray.init(
                address="local",
                num_cpus=self.cpus,
                num_gpus=self.gpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(self.folder),
            )
        address = ray.util.get_node_ip_address()
        if address != LOOPBACK:
            raise RuntimeError(
                f"Ray listens at {address} instead of {LOOPBACK}: it was imported before its "
                "environment was set"
            )
        children = {process.name(): process for process in psutil.Process().children()}
        self._servers = {name: children[name] for name in (GCS, RAYLET) if name in children}

    def end(self) -> None:
        if not self.imported:  # a second signal has cut that, and another import would fail
            return
        import ray

        started = psutil.Process().children(recursive=True)
        ray.shutdown()
        for process in started:
            if _is_of_ray_train(process):  # a stopped process has not heard that it is over
                process.kill()
        self.take_printed(ended=True)

    @property
    def logs(self) -> Path:
        return self.folder / "session_latest" / "logs"

    def take_printed(self, *, ended: bool = False) -> None:
        if self.printed is not None:
            self.printed.take(self.logs, ended=ended)

    def dead_servers(self) -> list[str]:
        return [name for name, process in self._servers.items() if _is_dead(process)]


_own: list[_OwnRay] = []  # none or one, as Ray itself is


def dead_server() -> str | None:
    """Return which of GCS and RAYLET of this process's own Ray has died, if one has."""
    return next(iter(dead_servers()), None)


def dead_servers() -> list[str]:
    """Return all of GCS and RAYLET of this process's own Ray that have died."""
    return _own[0].dead_servers() if _own else []


def _is_dead(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def restart() -> None:
    """Start this process's own Ray again after its raylet, or what holds its places, has died."""
    _own[0].end()
    _own[0].start()


def end_frozen_workers() -> None:
    """End the workers that Ray has given up, where they are processes of this machine's own Ray.

    A stopped process (SIGSTOP) does not hear that it is to end.
    """
    if _own:
        for process in psutil.Process().children(recursive=True):
            if _is_of_ray_train(process):
                process.kill()


def end_train() -> None:
    """End what Ray Train has started, its controller too, on this process's own Ray."""
    if _own:
        for process in psutil.Process().children(recursive=True):
            if _is_of_ray_train(process, "TrainController"):
                process.kill()


def logs() -> Path | None:
    """Return the folder of the logs of this process's own Ray."""
    return _own[0].logs if _own else None


def take_printed() -> None:
    """Bring what the processes of this process's own Ray have printed to the file of `output`."""
    if _own:
        _own[0].take_printed()


def _is_of_ray_train(process: psutil.Process, *others: str) -> bool:
    """Whether a process is one of Ray Train's workers, or of other actors of these names."""
    try:
        line = " ".join(process.cmdline())
        return any(name in line for name in ("RayTrainWorker", *others))
    except psutil.Error:  # it has ended
        return False


@contextmanager
def _joined(address: str, *, with_output: bool) -> Iterator[None]:
    _check_listening(address)
    try:
        with held_back():
            import ray

            with unused_services.messages_left_out():
                ray.init(address=address, log_to_driver=with_output, logging_level=logging.ERROR)
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
