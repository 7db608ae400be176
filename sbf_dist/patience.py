"""Waiting for an object store that does not answer."""

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from sbf_dist.errors import RunError
from sbf_dist.object_storage import StoreUnreachableError

PATIENCE_SECONDS = 120.0
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 15.0

_log = logging.getLogger(__name__)
_NEVER = threading.Event()

Answer = TypeVar("Answer")


def patiently(ask: Callable[[], Answer], stopped: threading.Event = _NEVER) -> Answer:
    """Return ask(), which is tried again while the store does not answer; a line says so once.

    What is only interrupted must be repeatable. RunError after PATIENCE_SECONDS, or once `stopped`
    is set.
    """
    start = time.monotonic()
    pause = _FIRST_PAUSE_SECONDS
    said = False
    while True:
        try:
            answer = ask()
        except StoreUnreachableError as error:
            if time.monotonic() - start + pause > PATIENCE_SECONDS:
                raise RunError(
                    f"{error}; gave up after {PATIENCE_SECONDS:g} s; run the same command again "
                    "once the store answers"
                ) from error
            if not said:
                _log.warning("%s; retrying for %g s", error, PATIENCE_SECONDS)
            said = True
            if stopped.wait(pause):
                raise RunError(str(error)) from error
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        else:
            if said:
                _log.warning("the store answers again")
            return answer
