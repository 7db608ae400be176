"""A cluster's dashboard, brought to this machine by SSH while a command lasts."""

import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sbf_dist.errors import UserError

SECONDS = 60.0  # until the dashboard must have been reached
_POLL_SECONDS = 0.3
# Of what `ray dashboard` prints, which ends with SSH's command line: SSH's reason, or Ray's.
_REASON = re.compile(
    r"^ssh: .*|.*Permission denied.*|.*Head node of cluster .*|.*No such file.*|^Load key .*",
    re.MULTILINE,
)


@contextmanager
def forwarded_dashboard(cluster_file: Path) -> Iterator[str]:
    """Give the URL of the dashboard of the cluster that `ray up` has started from `cluster_file`.

    `ray dashboard` forwards it to a free port of this machine's loopback address. UserError: there
    is no such file, or no such cluster, or it does not answer in SECONDS.
    """
    if not cluster_file.is_file():
        raise UserError(f"cluster file {cluster_file} does not exist")
    port = _free_port()
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "dashboard", str(cluster_file), "--port", str(port)]
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + SECONDS
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    printed.seek(0)
                    raise UserError(
                        f"cluster file {cluster_file}: its dashboard cannot be reached: "
                        + reason(printed.read().decode(errors="replace"))
                    )
                time.sleep(_POLL_SECONDS)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def reason(printed: str) -> str:
    """Return why `ray dashboard` has failed, of all that it has printed."""
    found = _REASON.findall(printed)
    lines = [line.strip() for line in found or printed.splitlines() if line.strip()]
    return lines[-1].removeprefix("The exception is: ") if lines else "ray dashboard says nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
