"""What workers and servers of Ray have logged, kept in the run's folder: Ray's own is removed."""

from collections.abc import Iterator
from pathlib import Path

from launchers.on_ray import local_ray
from launchers.on_ray.failures import AttemptError
from launchers.on_ray.printed import FILES
from sbf_dist.files import write_text

STACKS = "-stacks.txt"  # how the names of the files with workers' stacks end
_MAX_CHARACTERS = 100_000  # of a file; the end counts
_FILES = (*FILES, "train/ray-train-app-*.log")


def keep_logs(folder: Path, name: str, failure: AttemptError, since: float) -> Path:
    """Write one file with all that is known of a failure; its path.

    That is: the error, where the threads of hanging workers were, and what the processes of this
    machine have written after `since` (seconds, as time.time). On a cluster the other machines keep
    theirs.
    """
    number = len(list(folder.glob(f"{name}-*.log"))) + 1
    path = folder / f"{name}-{number}.log"
    parts = [failure.details, *_stacks(folder), *_logged(local_ray.logs(), since)]
    write_text(path, "\n".join(parts) + "\n")
    return path


def _stacks(folder: Path) -> Iterator[str]:
    """Take in where the threads of workers were that made no step (see stopping.py)."""
    for file in sorted(folder.glob(f"*{STACKS}")):
        text = file.read_text(errors="replace").strip()
        file.unlink()
        if text:
            yield f"--- {file.name}\n{text}"


def _logged(logs: Path | None, since: float) -> Iterator[str]:
    if logs is None:
        return
    for pattern in _FILES:
        for file in sorted(logs.glob(pattern)):
            if file.stat().st_mtime < since:
                continue
            text = file.read_text(errors="replace").strip()
            if text:
                yield f"--- {file.name}\n{text[-_MAX_CHARACTERS:]}"
