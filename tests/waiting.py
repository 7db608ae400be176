"""Waiting for what another thread or process does."""

import time
from collections.abc import Callable

LIMIT_SECONDS = 240.0  # against hangs alone: machines are busy, and processes are stopped


def eventually(holds: Callable[[], object]) -> None:
    """Wait until it holds. AssertionError where it does not within LIMIT_SECONDS."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"not within {LIMIT_SECONDS:g} s"
        time.sleep(0.02)
