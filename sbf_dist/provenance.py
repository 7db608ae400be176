"""Which code a result comes from."""

import contextlib
import subprocess
from importlib import metadata
from pathlib import Path

VERSIONS_OF = ("torch", "ray", "deepspeed", "nvidia-dali-cuda130", "mlflow", "timm")


def origin() -> dict[str, str]:
    """Return which code runs: versions of the packages that matter, and the commit of ours."""
    tags = {}
    for package in VERSIONS_OF:
        with contextlib.suppress(metadata.PackageNotFoundError):
            tags[f"version.{package}"] = metadata.version(package)
    here = Path(__file__).parent
    # the work tree must be ours: an installed package may lie inside somebody else's
    if _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return tags
    commit = _git(here, "rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["git.dirty"] = "true" if _git(here, "status", "--porcelain") else "false"
    return tags


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, or None if it fails or is not installed."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
