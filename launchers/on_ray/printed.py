"""What Ray's processes on this machine print, in a file of the run: Ray's folder is removed."""

import re
from pathlib import Path

FILES = ("worker-*.err", "worker-*.out", "raylet.err", "gcs_server.err")
# How Ray says in these files whose lines follow.
_RAYS_OWN = re.compile(rb"^:(job_id|actor_name|task_name):.*\n?", re.MULTILINE)


class Printed:
    """Appends what is new in the files of Ray's processes to `kept`, under a line with the name."""

    def __init__(self, kept: Path) -> None:
        self._kept = kept
        self._taken: dict[Path, int] = {}  # bytes of each file

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
        self._taken[file] = taken + len(new)
        lines = _RAYS_OWN.sub(b"", new)
        if not lines.strip():
            return
        self._kept.parent.mkdir(parents=True, exist_ok=True)
        end = b"" if lines.endswith(b"\n") else b"\n"
        with self._kept.open("ab") as kept:
            kept.write(b"--- " + file.name.encode() + b"\n" + lines + end)
