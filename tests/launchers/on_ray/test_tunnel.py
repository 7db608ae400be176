"""Why a dashboard could not be brought here, in what `ray dashboard` prints."""

import pytest

from launchers.on_ray.tunnel import reason

START = "Attempting to establish dashboard locally at http://localhost:9999/ connected to 8265\n"
POSSIBLE = """Error: Failed to forward dashboard. There are a couple possibilities:
 1. The remote port is incorrectly specified
 2. The local port 9999 is already in use.
"""
COMMAND = (
    " The exception is: Command failed:\n\n  ssh -tt -L 9999:localhost:8265 -i key root@head\n"
)


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        (
            f"{START}ssh: connect to host 10.0.0.1 port 22: No route to host\n{POSSIBLE}{COMMAND}",
            "ssh: connect to host 10.0.0.1 port 22: No route to host",
        ),
        (
            f"{START}root@head: Permission denied (publickey).\n{POSSIBLE}{COMMAND}",
            "root@head: Permission denied (publickey).",
        ),
        (
            f"{START}{POSSIBLE} The exception is: Head node of cluster (a) not found!\n",
            "Head node of cluster (a) not found!",
        ),
        (f"{START}something else\n\n", "something else"),
        ("", "ray dashboard says nothing"),
    ],
)
def test_the_reason_is_ssh_s_or_ray_s_own(printed: str, found: str) -> None:
    assert reason(printed) == found
