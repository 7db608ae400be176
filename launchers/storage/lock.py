"""A lock in an object store, which two drivers cannot both take; it needs listing alone.

Each driver writes an object of its own and lists afterwards. Whoever then sees another living one
gives way: of two that start at once both may, and never none. A driver renews its object; one that
has not been renewed for STALE_AFTER_SECONDS is of a driver that was killed. All times are the
store's: clocks of machines differ.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any, Self

from sbf_dist.errors import UserError
from sbf_dist.object_storage import ObjectFolder, StoredObject, StoreUnreachableError

HEARTBEAT_SECONDS = 15.0
STALE_AFTER_SECONDS = 90.0
# Between taking the lock and the first change: stores tell times of changes by the second, so that
# an object that one driver writes after another never has the same.
SETTLING_SECONDS = 2.0

_log = logging.getLogger(__name__)


class StoreLock:
    """The right to change the run `shown`, from take() to the end of its context.

    folder  holds the objects of the lock
    copy  which working copy this driver has, of which it alone has the file lock: an object of the
          same copy, of this host, is of a driver that is dead
    """

    def __init__(self, folder: ObjectFolder, shown: str, copy: str) -> None:
        self._folder = folder
        self._shown = shown
        self._copy = copy
        self._key = f"{uuid.uuid4().hex}.json"
        self._host = socket.gethostname()
        self._renewing = threading.Lock()
        self._renewed = 0.0
        self._modified = 0.0
        self._lost: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def take(self) -> None:
        """Take the lock. UserError if another driver has it."""
        self._write()
        try:
            objects = self._folder.objects()
            self._modified = objects[self._key].modified
            dead = [key for key in objects if not self._is_alive(key, objects[key], refuse=True)]
            for key in dead:
                self._folder.remove(key)
            time.sleep(SETTLING_SECONDS)
        except BaseException:
            self._folder.remove(self._key)
            raise

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self._folder.remove(self._key)
        except (StoreUnreachableError, UserError) as fault:
            _log.warning(
                "the lock of %s is not released, it expires in %g s: %s",
                self._shown,
                STALE_AFTER_SECONDS,
                fault,
            )

    def check(self) -> None:
        """UserError if another driver has taken the run over; called before each change."""
        if _now() - self._renewed > STALE_AFTER_SECONDS / 2:  # this machine slept, or the store
            self._renew()
        if self._lost is not None:
            raise UserError(self._lost)

    def _is_alive(self, key: str, found: StoredObject, *, refuse: bool) -> bool:
        """Whether an object is of a driver at work; a UserError that names it, to `refuse`."""
        if key == self._key:
            return True
        age = max(0.0, self._modified - found.modified)
        try:
            about: dict[str, Any] = json.loads(self._folder.read(key))
        except FileNotFoundError:  # it has given way
            return True
        except ValueError:
            about = {}
        mine = (about.get("copy"), about.get("host")) == (self._copy, self._host)
        if mine or age > STALE_AFTER_SECONDS:
            return False
        if refuse:
            raise UserError(
                f"run {self._shown} is in use by another sbf run, on {about.get('host')}, last "
                f"heartbeat {age:.0f} s ago; wait for it, or give another name (name=…); if it "
                f"was killed, its lock expires in {STALE_AFTER_SECONDS - age:.0f} s"
            )
        return True

    def _write(self) -> None:
        about = {"host": self._host, "process": os.getpid(), "copy": self._copy}
        begun = _now()
        self._folder.write(self._key, json.dumps(about).encode())
        self._renewed = begun

    def _beat(self) -> None:
        said = False
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                self._renew()
                said = False
            except (StoreUnreachableError, UserError) as error:
                if not said:
                    _log.warning("the lock of %s cannot be renewed: %s", self._shown, error)
                said = True
            if self._lost is not None:
                os.kill(os.getpid(), signal.SIGTERM)  # check() says why
                return

    def _renew(self) -> None:
        """Show that this driver is alive, unless its lock has been taken from it."""
        with self._renewing:
            if self._lost is not None:
                return
            before = self._folder.find(self._key)
            if before is None:
                self._lose()
                return
            self._write()
            objects = self._folder.objects()
            if self._key not in objects:
                self._lose()
                return
            self._modified = objects[self._key].modified
            # Taken for dead: whoever did not see this renewal is seen here.
            late = self._modified - before.modified > STALE_AFTER_SECONDS
            others = [key for key in objects if key != self._key]
            if late and any(self._is_alive(key, objects[key], refuse=False) for key in others):
                self._folder.remove(self._key)
                self._lose()

    def _lose(self) -> None:
        self._lost = (
            f"run {self._shown}: another driver has taken over, as this one sent no heartbeat "
            f"for {STALE_AFTER_SECONDS:g} s or its lock was removed; this one stops"
        )


def _now() -> float:
    """Seconds on a clock that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
