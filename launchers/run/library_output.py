"""What libraries print while a run works goes to a file of the run: the terminal has our lines.

Standard output and standard error are led to the file by their descriptors, so that lines of C++
and of processes that are started come there as well. Our own lines go where both led before.
"""

import ctypes
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TextIO

from rich.console import Console

from sbf_dist.errors import UserError

_PACKAGES = ("launchers", "pipelines", "sbf_dist")
_STANDARD = (1, 2)  # descriptors of standard output and standard error


@dataclass
class OwnOutput:
    """Where our own lines go meanwhile: `console` for standard output, `errors` for the other.

    libraries  the file that all else goes to, log: its name, once it has one
    """

    console: Console
    errors: TextIO
    libraries: TextIO
    log: Path | None = None

    def warn(self, line: str) -> None:
        """Print a line to standard error; where both are a terminal, above the bars on it."""
        if self.console.is_terminal and self.errors.isatty():
            self.console.print(line, markup=False, soft_wrap=True)
        else:
            print(line, file=self.errors, flush=True)

    def keep_in(self, log: Path) -> None:
        """From now on append what libraries print to `log`, with what they have printed before."""
        log.parent.mkdir(parents=True, exist_ok=True)
        before = self._printed()
        with log.open("ab") as file:
            begun = datetime.now().astimezone().isoformat(timespec="seconds")
            file.write(f"--- {begun}\n".encode() + before)
            file.flush()
            place, spool = self.libraries.fileno(), os.fstat(self.libraries.fileno())
            for descriptor in (place, *_STANDARD):
                if os.path.samestat(os.fstat(descriptor), spool):
                    os.dup2(file.fileno(), descriptor)
        self.log = log

    def show(self) -> None:
        """Print what libraries have printed, if it is kept nowhere."""
        if self.log is None:
            print(self._printed().decode(errors="replace"), end="", file=self.errors, flush=True)

    def _printed(self) -> bytes:
        self.libraries.flush()
        return os.pread(self.libraries.fileno(), os.fstat(self.libraries.fileno()).st_size, 0)


@contextmanager
def kept_apart() -> Iterator[OwnOutput]:
    """Keep what is printed, and logged by libraries, apart while the context lasts.

    Ours are the records of our own packages' loggers, with --verbose all, and what is printed to
    what this gives. It is given the file in which the rest is kept; without one, all of that is
    printed at the end. An error but UserError that leaves the context names the file in a note.
    """
    with ExitStack() as stack:
        file = stack.enter_context(
            tempfile.TemporaryFile("w", buffering=1, errors="backslashreplace")
        )
        out = stack.enter_context(_led_to(file, sys.stdout))
        err = stack.enter_context(_led_to(file, sys.stderr))
        own = OwnOutput(Console(file=out, highlight=False), err, file)
        stack.callback(own.show)
        stack.enter_context(_logging_divided(own))
        stack.enter_context(_failed_threads_named(own))
        try:
            yield own
        except UserError:
            raise
        except Exception as error:
            if own.log is not None:
                error.add_note(f"what libraries have printed is in {own.log}")
            raise


@contextmanager
def _led_to(file: TextIO, stream: TextIO) -> Iterator[TextIO]:
    """Lead a standard stream to `file`; gives one that leads where it led before.

    Its object stays, as libraries keep it. One that has no descriptor of its own, as a test's,
    stays as it is.
    """
    if stream is not sys.__stdout__ and stream is not sys.__stderr__:
        yield stream
        return
    number = stream.fileno()
    before = os.dup(number)
    own = os.fdopen(before, "w", buffering=1, encoding=stream.encoding, errors=stream.errors)
    was_by_line = getattr(stream, "line_buffering", False)
    _flush(stream)
    os.dup2(file.fileno(), number)
    stream.reconfigure(line_buffering=True)
    try:
        with own:
            try:
                yield own
            finally:
                _flush(stream)
                os.dup2(before, number)
    finally:
        stream.reconfigure(line_buffering=was_by_line)


def _flush(stream: TextIO) -> None:
    """Let out what Python, and what C's own library, have not written yet."""
    stream.flush()
    ctypes.CDLL(None).fflush(None)


@contextmanager
def _logging_divided(own: OwnOutput) -> Iterator[None]:
    """Bring records of our packages to the user, and those of all others to the file."""
    root = logging.getLogger()
    ours, others = _OwnRecords(own), logging.StreamHandler(own.libraries)
    ours.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    others.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    others.addFilter(lambda record: not _is_ours(record.name))
    if root.getEffectiveLevel() > logging.INFO:
        ours.addFilter(lambda record: _is_ours(record.name))
    to_terminal = [h for h in root.handlers if getattr(h, "stream", None) is sys.stderr]
    for handler in to_terminal:
        root.removeHandler(handler)
    for handler in (ours, others):
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in (ours, others):
            root.removeHandler(handler)
        for handler in to_terminal:
            root.addHandler(handler)


class _OwnRecords(logging.Handler):
    """Brings records to the user."""

    def __init__(self, own: OwnOutput) -> None:
        super().__init__()
        self._own = own

    def emit(self, record: logging.LogRecord) -> None:
        self._own.warn(self.format(record))


@contextmanager
def _failed_threads_named(own: OwnOutput) -> Iterator[None]:
    """Name a thread of ours that ends with an error; its traceback is with what libraries print."""
    before = threading.excepthook

    def hook(found: threading.ExceptHookArgs) -> None:
        before(found)
        trace = found.exc_traceback
        while trace is not None:
            if _is_ours(trace.tb_frame.f_globals.get("__name__", "")):
                name = found.thread.name if found.thread is not None else "?"
                where = "" if own.log is None else f"; its traceback is in {own.log}"
                own.warn(f"ERROR thread {name}: {found.exc_value!r}{where}")
                return
            trace = trace.tb_next

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] in _PACKAGES
