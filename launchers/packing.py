"""What of a checkout is sent to a cluster: the files that Git would keep, without results."""

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from sbf_dist.errors import UserError

MOST_BYTES = 100 * 2**20  # that Ray takes
SHOWN = 5  # of the largest files of what is too much
# What a run writes or reads in bulk; and what only this machine can use.
LEFT_OUT = ("runs", "data", ".git", ".venv", "build", "__pycache__")


def files_of(root: Path) -> list[Path]:
    """Return the files below `root` that are sent, as paths in it.

    In a Git checkout: those that are tracked or could be. Elsewhere all that are not hidden. Links
    are left out, as are LEFT_OUT and compiled extensions. UserError: there is nothing, or more than
    MOST_BYTES.
    """
    listed = _listed_by_git(root)
    if listed is None:
        listed = [path.relative_to(root) for path in sorted(root.rglob("*"))]
        listed = [path for path in listed if not any(p.startswith(".") for p in path.parts)]
    files = [path for path in listed if _is_sent(root, path)]
    if not files:
        raise UserError(f"folder {root}: contains no file to upload")
    check_size(root, files)
    return files


def check_size(root: Path, files: Iterable[Path]) -> None:
    """UserError, which names the largest files, if they are more than Ray takes."""
    sizes = {path: (root / path).stat().st_size for path in files}
    total = sum(sizes.values())
    if total <= MOST_BYTES:
        return
    largest = sorted(sizes, key=lambda path: -sizes[path])[:SHOWN]
    raise UserError(
        f"folder {root}: {total / 2**20:,.0f} MiB would be uploaded, Ray's limit is "
        f"{MOST_BYTES / 2**20:.0f}; the largest files are "
        + ", ".join(f"{path} ({sizes[path] / 2**20:,.1f} MiB)" for path in largest)
        + "; move them to data/ or runs/, or list them in .gitignore"
    )


def pack(root: Path, files: Iterable[Path], into: Path) -> None:
    """Copy `files` of `root` into the folder `into`."""
    for path in files:
        target = into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / path, target)


def _is_sent(root: Path, path: Path) -> bool:
    if path.parts[0] in LEFT_OUT or "__pycache__" in path.parts or path.suffix == ".so":
        return False
    return (root / path).is_file() and not (root / path).is_symlink()


def _listed_by_git(root: Path) -> list[Path] | None:
    """Return what Git tracks or would add below `root`, or None where it is no checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return sorted(Path(name.decode()) for name in set(done.stdout.split(b"\0")) if name)
