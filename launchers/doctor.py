"""The work of `sbf doctor`: what is installed, built and reached, and what to do otherwise."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from launchers.machine import available_cpus, available_gpus
from sbf_dist.errors import UserError
from sbf_dist.tracking.address import Address

State = Literal["ok", "note", "broken"]

INSTALL = "make setup (in the root of the repository)"
MIN_PYTHON = (3, 11)
_GB = 10**9
_MIN_FREE_GB = 2.0
_IMPORT_SECONDS = 120.0
# Distribution, and the module that has to be importable.
_PACKAGES = (
    ("torch", "torch"),
    ("torchvision", "torchvision"),
    ("timm", "timm"),
    ("ray", "ray"),
    ("deepspeed", "deepspeed"),
    ("nvidia-dali-cuda130", "nvidia.dali"),
    ("mlflow", "mlflow"),
    ("onnxruntime", "onnxruntime"),
)


@dataclass(frozen=True)
class Finding:
    """What one check has found. remedy: what to do; None where nothing has to be done.

    A "note" says what some commands would need, "broken" what all of them do.
    """

    name: str
    state: State
    found: str
    remedy: str | None = None


def examine(runs: Path, tracking: Address) -> Iterator[Finding]:
    """Check one thing after another. runs: folder of the runs; tracking: MLflow's store."""
    yield _python()
    for distribution, module in _PACKAGES:
        yield _guarded(distribution, lambda d=distribution, m=module: _package(d, m))  # type: ignore[misc]
    checks: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("ninja", _ninja),
        ("extension", _extension),
        ("GPU", _gpu),
        ("Ray", _ray),
        ("MLflow", lambda: _mlflow(tracking)),
        ("disk", lambda: _disk(runs)),
    )
    for name, check in checks:
        yield _guarded(name, check)


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """Do a check; what it raises is what it has found."""
    try:
        return check()
    except Exception as error:  # any package may fail in its own way
        reason = " ".join(str(error).split())[:300]
        return Finding(name, "broken", f"{type(error).__name__}: {reason}", INSTALL)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        return Finding("Python", "broken", version, f"install Python {wanted} or newer")
    return Finding("Python", "ok", version)


def _package(distribution: str, module: str) -> Finding:
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return Finding(distribution, "broken", "not installed", INSTALL)
    fault = import_fault(module)
    if fault is not None:
        return Finding(distribution, "broken", f"{version}, cannot be imported: {fault}", INSTALL)
    return Finding(distribution, "ok", version)


def import_fault(module: str) -> str | None:
    """Import a module in a process of its own, which a broken binary may end; what went wrong."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=_IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"timed out after {_IMPORT_SECONDS:.0f} s"
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines()
    return said[-1][:300] if said else f"the process ended with {done.returncode}"


def _ninja() -> Finding:
    beside = Path(sys.executable).with_name("ninja")
    found = shutil.which("ninja") or (str(beside) if beside.exists() else None)
    if found is None:
        return Finding("ninja", "broken", "not found; DeepSpeed compiles with it", INSTALL)
    return Finding("ninja", "ok", found)


def _extension() -> Finding:
    from sbf_dist import extension  # whose errors name the remedy

    built = extension.build_info()
    if built["cuda"]:
        return Finding("extension", "ok", f"with CUDA kernels for {built['cuda_archs']}")
    import torch

    if torch.cuda.is_available():
        return Finding(
            "extension",
            "broken",
            "without CUDA, and this machine has a GPU",
            "SBF_DIST_CUDA=1 make setup, which reports what is missing",
        )
    return Finding("extension", "ok", "for the CPU alone")


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("GPU", "ok", ", ".join(names))
    if Path("/dev/nvidia0").exists():
        return Finding(
            "GPU",
            "broken",
            f"found, but PyTorch (CUDA {torch.version.cuda}) cannot use it",
            "install an NVIDIA driver for this CUDA version; nvidia-smi shows the installed one",
        )
    return Finding("GPU", "note", "none", "train on a machine with a GPU, or with workers.gpus=0")


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if address is None or address == "local":
        found = f"each run starts a local Ray: {available_cpus()} CPUs, {available_gpus()} GPUs"
        return Finding("Ray", "ok", found)
    from launchers.on_ray.seen import seen_by_ray

    try:
        return Finding("Ray", "ok", seen_by_ray(address))
    except UserError as error:
        return Finding("Ray", "broken", str(error), "start that cluster, or unset RAY_ADDRESS")


def _mlflow(address: Address) -> Finding:
    from sbf_dist.tracking import answer

    reason = answer.refusal(address)
    if reason is None:
        return Finding("MLflow", "ok", f"{address.shown} answers")
    return Finding(
        "MLflow",
        "note",
        f"{address.shown}: {reason}",
        "start the server, or set MLFLOW_TRACKING_URI; until it answers, runs keep metrics on disk",
    )


def _disk(runs: Path) -> Finding:
    place = runs.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / _GB
    found = f"{free:.1f} GB free for {runs}"
    if free < _MIN_FREE_GB:
        return Finding(
            "disk", "note", found, "free some space, or give --runs a folder on another disk"
        )
    return Finding("disk", "ok", found)
