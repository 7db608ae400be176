"""Journals: what a run has to say to MLflow, as JSON lines in its folder, one entry a line.

Every process writes files of its own, so that none waits for another, on shared storage neither.
A line counts once it is whole; one that a full disk has cut is an entry of the kind "damaged".
"""

import json
import logging
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Entry = dict[str, Any]
_SECONDS_BETWEEN_SYNCS = 5.0  # what a loss of power may take


class Journal:
    """A file that this process alone appends to; it is made with its first entry.

    Where it cannot be written (a full disk), a warning says so once, and the entry is lost: that
    is no reason to stop a training, whose next checkpoint will find the same.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._descriptor: int | None = None
        self._torn = False
        self._synced = time.monotonic()
        self._warned = False

    def append(self, entry: Entry) -> None:
        """Write one entry; when this returns, it survives the end of this process."""
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        try:
            if self._descriptor is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self._descriptor = os.open(self.path, flags, 0o644)
            start = b"\n" if self._torn else b""
            self._torn = True
            self._torn = os.write(self._descriptor, start + line) < len(start + line)
            if self._torn:
                raise OSError("only part of a line could be written")
            if time.monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS:
                self.sync()
        except OSError as error:
            self._warn(error)

    def sync(self) -> None:
        """Let what was written survive a loss of power, too."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)
        self._synced = time.monotonic()

    def close(self) -> None:
        if self._descriptor is not None:
            try:
                self.sync()
            except OSError as error:
                self._warn(error)
            os.close(self._descriptor)
        self._descriptor = None

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            logger.warning("metrics are lost: %s cannot be written: %s", self.path, error)
        self._warned = True


def files(folder: Path) -> list[Path]:
    """Return the journals in a folder, oldest first."""
    return sorted(folder.glob("*.jsonl"))


def read(path: Path, offset: int = 0) -> Iterator[tuple[Entry, int]]:
    """Yield the whole entries from byte `offset` on, each with the offset of its end."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):  # being written, or cut
                return
            offset += len(line)
            try:
                entry = json.loads(line)
                known = isinstance(entry, dict) and isinstance(entry.get("kind"), str)
            except ValueError:
                known = False
            yield entry if known else {"kind": "damaged"}, offset


def metrics_entry(values: Mapping[str, float], step: int) -> Entry:
    """Return the entry for numbers (also 0-dimensional tensors) at `step`, with the time of now."""
    numbers = {name: float(value) for name, value in values.items()}
    return {
        "kind": "metrics",
        "step": step,
        "time": now(),
        # JSON has no numbers that are not finite.
        "metrics": {n: v if math.isfinite(v) else str(v) for n, v in numbers.items()},
    }


def now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return int(time.time() * 1000)
