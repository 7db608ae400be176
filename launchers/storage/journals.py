"""Journals of what is logged, brought from each machine to the store, and from there to the driver.

An entry is delivered to MLflow once the store has it. So a driver on another machine knows of all
that was delivered, and no series goes back or stands twice.
"""

import logging
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from launchers.storage.working_copy import WorkingCopy
from sbf_dist.errors import UserError
from sbf_dist.object_storage import StoreUnreachableError

JOURNALS = ("tracking", "tracking.json")
PAUSE_SECONDS = 10.0
_HURRIED_PAUSE_SECONDS = 0.5

_log = logging.getLogger(__name__)


class JournalMirror:
    """Publishes `parts` of a copy every few seconds, in a thread, while the context lasts.

    fetches  whether it also fetches what other machines have published of them
    """

    def __init__(
        self, copy: WorkingCopy, parts: tuple[str, ...] = JOURNALS, *, fetches: bool
    ) -> None:
        self._copy = copy
        self._parts = parts
        self._fetches = fetches
        self._sizes: dict[str, int] = {}
        self._pause = PAUSE_SECONDS
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._away = False
        self._thread = threading.Thread(target=self._work, name="journals", daemon=True)

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
        self._wake.set()
        self._thread.join()
        self._mirror()

    def hurry(self) -> None:
        """Let what is said from now on be published at once: somebody waits for it."""
        self._pause = _HURRIED_PAUSE_SECONDS
        self._wake.set()

    def kept(self, journal: Path) -> int:
        """Return how many bytes of a journal of the copy are in the store."""
        return self._sizes.get(journal.relative_to(self._copy.root).as_posix(), 0)

    def _work(self) -> None:
        while not self._ended.is_set():
            self._wake.clear()
            self._mirror()
            self._wake.wait(self._pause)

    def _mirror(self) -> None:
        try:
            if self._fetches:
                self._copy.fetch_once(*self._parts)
            self._copy.publish_once(*self._parts)
            self._sizes = self._copy.stored_sizes()
        except (StoreUnreachableError, UserError) as error:
            if not self._away:
                _log.warning("logs are not published: %s", error)
            self._away = True
        else:
            self._away = False
