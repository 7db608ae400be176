"""The courier: brings journals to the store, in the background, each entry once."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sbf_dist.errors import UserError
from sbf_dist.tracking import journal
from sbf_dist.tracking.journal import Entry
from sbf_dist.tracking.state import WHOLE_RUN, State
from sbf_dist.tracking.store import (
    MAX_REQUEST_METRICS,
    RefusedError,
    Store,
    StoreAwayError,
)

logger = logging.getLogger(__name__)

ARTIFACTS = "artifacts"  # folder below a key's, with the journals of its artifacts
_POLL_SECONDS = 2.0
_RETRY_SECONDS = 10.0
_WAITING_RETRY_SECONDS = 1.0  # when the end of a run waits


class Courier:
    """A thread that gives `store` what the journals below `folder` say, from start() to close().

    folder  with a folder of journals for each key of `state`
    shown   name of the store, for messages
    kept    how many bytes of a journal are safe where the run is kept, and may be delivered;
            without it all are

    Where the store stops answering, everything stays in the journals and is tried again. What may
    have arrived before a failure or a kill is compared with what the store has.
    """

    def __init__(
        self,
        folder: Path,
        state: State,
        store: Store,
        shown: str,
        kept: Callable[[Path], int] | None = None,
    ) -> None:
        self.first_try = threading.Event()
        self.error: UserError | None = None  # of the first try
        self.reached = False  # at any time
        self._folder = folder
        self._state = state
        self._store = store
        self._shown = shown
        self._connected = False
        self._away = False
        self._found: set[str] = set()  # keys whose run is known to be in the store
        self._kept = kept or _size
        # Up to where the store may have entries of journals already, beyond what the state says.
        self._unsure = {
            self._place(file): _size(file) for key in self._keys() for file in self._all(key)
        }
        self._progress = time.monotonic()
        self._pause = _RETRY_SECONDS
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def start(self) -> None:
        """Begin with what there is."""
        self._thread.start()

    def waiting(self) -> str:
        """Say what the store does not have."""
        entries = list(self._undelivered())
        metrics = sum(len(entry.get("metrics", ())) for entry in entries)
        others = sum(entry["kind"] != "metrics" for entry in entries)
        return f"{metrics} metrics and {others} other entries"

    @property
    def experiment_id(self) -> str:
        """The experiment of new runs; "" until the store has answered."""
        return self._store.experiment_id

    def wait(self, seconds: float) -> bool:
        """Wait until the store has all that the journals say now; at most `seconds` of silence.

        Whether it has.
        """
        self._pause = _WAITING_RETRY_SECONDS
        start = time.monotonic()
        try:
            while any(True for _ in self._undelivered()):
                if time.monotonic() - max(start, self._progress) > seconds:
                    return False
                self._wake.set()
                with self._changed:
                    self._changed.wait(0.1)
            return True
        finally:
            self._pause = _RETRY_SECONDS

    def close(self) -> None:
        """End the thread: at once, or with the request that it waits for."""
        self._closed.set()
        self._wake.set()
        self._thread.join(timeout=0.5)

    def _work(self) -> None:
        while not self._closed.is_set():
            self._wake.clear()
            try:
                self._deliver_all()
            except (StoreAwayError, UserError) as error:
                self._say_away(error)
            except OSError as error:  # of the run's own folder: the store's are StoreAwayError
                if not self._away:
                    logger.warning("metrics wait in %s: %s", self._folder, error)
                self._away = True
            except Exception:  # a fault of ours must not end the thread silently
                if not self._away:
                    logger.exception("tracking store %s", self._shown)
                self._away = True
            else:
                if self._away and not self._closed.is_set():  # which ends a delivery early
                    logger.warning("tracking store %s answers again", self._shown)
                self._away = False
            self.first_try.set()
            with self._changed:
                self._changed.notify_all()
            self._wake.wait(self._pause if self._away else _POLL_SECONDS)
            if self._away and self._wake.is_set():
                self._closed.wait(_WAITING_RETRY_SECONDS)

    def _say_away(self, error: Exception) -> None:
        if isinstance(error, UserError) and not self.first_try.is_set():
            self.error = error
        elif not self._away:
            logger.warning(
                "tracking store %s does not answer (%s); metrics are kept in %s",
                self._shown,
                error,
                self._folder,
            )
        self._away = True
        self._connected = False

    def _deliver_all(self) -> None:
        if not self._connected:
            self._store.connect()
            self._found.clear()
        self._connected = True
        # Where artifacts are refused, metrics must not wait for them.
        for lane in (self._files, self._files_of_artifacts):
            for key in self._keys():
                if any(self._has_more(file) for file in lane(key)):
                    run_id = self._run_of(key)  # a new one gets all from the start
                    for file in lane(key):
                        if self._has_more(file):
                            self._deliver(run_id, file)
            self.reached = True

    def _has_more(self, file: Path) -> bool:
        return self._kept(file) > self._state.sent.get(self._place(file), 0)

    def _deliver(self, run_id: str, file: Path) -> None:
        place = self._place(file)
        start = self._state.sent.get(place, 0)
        for entries, end in _batches(file, start, self._kept(file)):
            if self._closed.is_set():
                return
            again = start < self._unsure.get(place, 0)
            self._unsure[place] = max(end, self._unsure.get(place, 0))
            self._give(run_id, entries, again=again)
            start = self._state.sent[place] = end
            self._state.save()
            self._progress = time.monotonic()

    def _give(self, run_id: str, entries: list[Entry], *, again: bool) -> None:
        """Give entries to the store; what it refuses is left out, and nothing else."""
        try:
            self._store.deliver(run_id, entries, again=again)
        except RefusedError as error:
            if len(entries) == 1:
                logger.warning("MLflow refuses an entry (%s): %s", entries[0]["kind"], error)
                return
            for entry in entries:
                self._give(run_id, [entry], again=True)

    def _run_of(self, key: str) -> str:
        """Return the id of a key's run, which is created if it is not in the store."""
        known = self._state.run_ids.get(key)
        if known is not None and (key in self._found or self._has(key, known)):
            self._found.add(key)
            self._state.recovered = self._state.recovered and key != WHOLE_RUN
            return known
        if known is not None:
            logger.warning(
                "MLflow run %s (%s) is not in %s any more: starting a new one",
                known,
                key,
                self._shown,
            )
            self._state.forget(key)
            self._state.recovered = self._state.recovered and key != WHOLE_RUN
        parent = None if key == WHOLE_RUN else self._run_of(WHOLE_RUN)
        run_id = self._store.new_run(key, self._beginning(key), parent)
        self._state.run_ids[key] = run_id
        self._state.save()
        self._found.add(key)
        return run_id

    def _has(self, key: str, run_id: str) -> bool:
        try:
            return self._store.has(run_id)
        except UserError:  # deleted: who has removed tracking.json wants another one
            if key == WHOLE_RUN and self._state.recovered:
                return False
            raise

    def _beginning(self, key: str) -> Entry:
        for file in self._files(key):
            for entry, _ in journal.read(file):
                if entry["kind"] == "begin":
                    return entry
        return {}

    def _undelivered(self) -> Iterator[Entry]:
        for key in self._keys():
            for file in self._all(key):
                for entry, _ in journal.read(file, self._state.sent.get(self._place(file), 0)):
                    yield entry

    def _keys(self) -> list[str]:
        if not self._folder.is_dir():
            return []
        names = sorted(path.name for path in self._folder.iterdir() if path.is_dir())
        return sorted(names, key=lambda name: name != WHOLE_RUN)  # the parent first

    def _files(self, key: str) -> list[Path]:
        return journal.files(self._folder / key)

    def _files_of_artifacts(self, key: str) -> list[Path]:
        return journal.files(self._folder / key / ARTIFACTS)

    def _all(self, key: str) -> list[Path]:
        return self._files(key) + self._files_of_artifacts(key)

    def _place(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()


def _size(file: Path) -> int:
    return file.stat().st_size


def _batches(file: Path, offset: int, limit: int) -> Iterator[tuple[list[Entry], int]]:
    """Yield entries that go in one request, and the offset of their end, `limit` at most."""
    batch: list[Entry] = []
    size = 0
    end = offset
    for entry, after in journal.read(file, offset):
        if after > limit:
            break
        own = len(entry["metrics"]) if entry["kind"] == "metrics" else 0
        if batch and (not own or size + own > MAX_REQUEST_METRICS):
            yield batch, end
            batch, size = [], 0
        if own:
            batch.append(entry)
            size += own
        else:
            yield [entry], after
        end = after
    if batch:
        yield batch, end
