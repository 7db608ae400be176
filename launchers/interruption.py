"""Signals that ask this program to end: Ctrl-C, SIGTERM (a machine that is taken away), SIGHUP."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """This program was asked to end by a signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What a shell reports for a program that the signal ended."""
        return 128 + self.signum


class Ended(SystemExit):
    """This program ends because of a signal; what it has begun is in order."""

    def leave(self) -> NoReturn:
        """End this process at once, without the destructors of libraries.

        A thread of Ray 2.60 outlives ray.shutdown (PubsubLongPolling of its GCS subscriber) and
        uses what they destroy: one of 15 interrupted runs ended by SIGSEGV after its last line.
        """
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(self.code or 0))


@dataclass
class Notice:
    """The first signal that came while work was going on that can be ended in good order."""

    signum: int | None = None
    since: float = 0.0  # time.monotonic()

    def raise_it(self) -> None:
        """Raise Interrupted for the signal, if one came."""
        if self.signum is not None:
            raise Interrupted(self.signum)


_handled: list[bool] = []  # not empty within `signals_raise`
_notices: list[Notice] = []  # of the innermost work that is going on, last


@contextmanager
def signals_raise() -> Iterator[None]:
    """Let SIGNALS raise Interrupted in the main thread; but see `noted`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    _handled.append(True)
    try:
        yield
    finally:
        _handled.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def take_signals_back() -> None:
    """Within `signals_raise`: handle the signals again after a library has taken them."""
    if _handled and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _handle)


@contextmanager
def held_back() -> Iterator[None]:
    """Within `signals_raise`: raise Interrupted for a signal at the end of the context.

    For imports and starts of libraries: cut by an exception, they may swallow it, or raise another
    one, and some set handlers of their own at once. What the body raises after a signal counts as
    its consequence.
    """
    if not _handled or threading.current_thread() is not threading.main_thread():
        yield
        return
    with noted() as notice, _handlers_stay():
        try:
            yield
        except Exception as error:
            if notice.signum is not None:
                raise Interrupted(notice.signum) from error
            raise


@contextmanager
def _handlers_stay() -> Iterator[None]:
    """Let our handlers stay where a library sets others, and take those back that C++ has set."""
    set_handler = signal.signal

    def keep(signum: int, handler: Any) -> Any:
        return set_handler(signum, _handle if signum in SIGNALS else handler)

    signal.signal = keep  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = set_handler
        take_signals_back()


@contextmanager
def noted() -> Iterator[Notice]:
    """Note the first signal instead of raising Interrupted; a second one raises.

    The first one is raised at the end, where the work was done before anybody looked at it.
    """
    notice = Notice()
    _notices.append(notice)
    try:
        yield notice
    finally:
        _notices.remove(notice)
    notice.raise_it()


def _handle(signum: int, frame: FrameType | None) -> None:
    if _notices and _notices[-1].signum is None:
        _notices[-1].signum, _notices[-1].since = signum, time.monotonic()
        return
    raise Interrupted(signum)
