"""What Ray's processes on this machine print, in a file of the run: Ray's folder is removed."""

import logging
import re
from pathlib import Path

logger = logging.getLogger(__name__)

FILES = ("worker-*.err", "worker-*.out", "raylet.err", "gcs_server.err")
# How Ray says in these files whose lines follow.
_RAYS_OWN = re.compile(rb"^:(job_id|actor_name|task_name):.*\n?", re.MULTILINE)


class Printed:
    """Appends what is new in the files of Ray's processes to `kept`, under a line with the name.

    Where that cannot be written (a full disk), a warning says so once, and it is tried again with
    what comes next: it is no reason to end a training, whose next checkpoint will find the same.
    """

    def __init__(self, kept: Path) -> None:
        self._kept = kept
        self._taken: dict[Path, int] = {}  # bytes of each file
        self._warned = False

    def take(self, logs: Path, *, ended: bool = False) -> None:
        """Take over whole lines; `ended`: the processes have, so a last line without an end too."""
        for pattern in FILES:
            for file in sorted(logs.resolve().glob(pattern)):
                self._take_file(file, ended)

    def _take_file(self, file: Path, ended: bool) -> None:
        taken = self._taken.get(file, 0)
        if file.stat().st_size <= taken:
            return
        with file.open("rb") as opened:
            opened.seek(taken)
            found = opened.read()
        new = found if ended else found[: found.rfind(b"\n") + 1]
        lines = _RAYS_OWN.sub(b"", new)
        if lines.strip():
            end = b"" if lines.endswith(b"\n") else b"\n"
            try:
                self._append(b"--- " + file.name.encode() + b"\n" + lines + end)
            except OSError as error:
                if not self._warned:
                    logger.warning("what workers print is not kept: %s: %s", self._kept, error)
                self._warned = True
                return
        self._taken[file] = taken + len(new)

    def _append(self, text: bytes) -> None:
        """Append all of it or nothing."""
        self._kept.parent.mkdir(parents=True, exist_ok=True)
        with self._kept.open("ab", buffering=0) as kept:
            before = kept.tell()
            try:
                if kept.write(text) < len(text):
                    raise OSError("only a part of it could be written")
            except OSError:
                kept.truncate(before)
                raise
