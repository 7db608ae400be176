"""Parts of the shards of a set in an object store, read by any number of threads."""

import atexit
import hashlib
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack

from pipelines.index import Contents, DataIndex
from pipelines.roots import located
from sbf_dist.errors import RunError, UserError
from sbf_dist.object_storage import ObjectFolder, OpenObject
from sbf_dist.patience import patiently

_log = logging.getLogger(__name__)

THREADS = 56  # for single images: of all connections, so many; others are for shards
_EXIT_SECONDS = 60.0  # that the end of a program waits for requests under way


class StoreReads:
    """Reads shards, and single images by their place in a shard, and checks what comes.

    What it does raises UserError for a shard that is missing or that has changed since it was
    indexed, and RunError where the store does not answer for minutes, or after `stop`.
    """

    def __init__(self, index: DataIndex) -> None:
        assert isinstance(index.root, ObjectFolder) and index.contents is not None
        self.root, self.names = index.root, index.shards
        self.contents: Contents = index.contents
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._open: dict[int, OpenObject] = {}
        self._files = ExitStack()
        self._asked: deque[tuple[Callable[[], bytes], Future[bytes]]] = deque()
        self._threads = 0
        self._idle = threading.Condition(self._lock)
        _at_exit(self)

    def stop(self) -> None:
        """Refuse further reads, and end those that wait for the store."""
        self.stopped.set()
        with self._idle:
            self._idle.notify_all()

    def named(self, shard: int) -> str:
        """A shard's address, for messages."""
        return f"{self.root}/{self.names[shard]}"

    def changed(self, shard: int) -> UserError:
        """What to say of a shard whose content is not what was indexed."""
        return UserError(
            f"shard {self.named(shard)}: has another content than when it was indexed; restore it "
            "(sbf data check shows what else has changed) or prepare the set again"
        )

    def read(self, shard: int, offset: int, count: int) -> bytes:
        """Return a part of a shard."""
        if self.stopped.is_set():
            raise RunError(f"shard {self.named(shard)}: is not read, the program ends")
        try:
            file = self._opened(shard)
            data = patiently(lambda: file.read(offset, count), self.stopped)
        except FileNotFoundError:
            raise UserError(
                f"shard {self.named(shard)}: is missing; restore it (sbf data check shows what "
                "else is missing) or prepare the set again"
            ) from None
        if len(data) < count:
            raise self.changed(shard)
        return data

    def image(self, shard: int, offset: int, count: int, sample: int, *, after: int = 0) -> bytes:
        """Return one image, asked for once more where its digest is not the one of the index.

        With it come the `after` bytes that follow it.
        """
        for final in (False, True):
            data = self.read(shard, offset, count + after)
            if self.is_image(data[:count], sample):
                return data
            if not final:
                _log.warning(
                    "shard %s: received a damaged image; fetching it again", self.named(shard)
                )
        raise self.changed(shard)

    def is_image(self, data: bytes, sample: int) -> bool:
        """Whether these are the bytes of an image as it was indexed."""
        return hashlib.sha256(data).digest() == self.contents.images[sample].tobytes()

    def image_soon(self, shard: int, offset: int, count: int, sample: int) -> "Future[bytes]":
        """Read one image in the background, in the order in which they are asked for."""
        return self.soon(lambda: self.image(shard, offset, count, sample))

    def soon(self, read: Callable[[], bytes]) -> "Future[bytes]":
        """Read something in the background, in the order in which it is asked for."""
        future: Future[bytes] = Future()
        with self._lock:
            self._asked.append((read, future))
            if self._threads < THREADS:
                self._threads += 1
                start_thread(self._work)
        return future

    def wait_until_idle(self) -> None:
        """Wait until nothing is read in the background any more, or until `stop`."""
        with self._idle:
            self._idle.wait_for(lambda: not self._threads or self.stopped.is_set())

    def _work(self) -> None:
        while True:
            with self._idle:
                if not self._asked:
                    self._threads -= 1
                    if not self._threads:
                        self._idle.notify_all()
                    return
                read, future = self._asked.popleft()
            try:
                future.set_result(read())
            except BaseException as error:
                future.set_exception(error)

    def _opened(self, shard: int) -> OpenObject:
        with self._lock:
            file = self._open.get(shard)
        if file is not None:
            return file
        folder, key = located(self.root, self.names[shard])

        def opened() -> OpenObject:
            with ExitStack() as new:
                found = new.enter_context(folder.opened(key))
                with self._lock:
                    self._files.push(new.pop_all())
                    return self._open.setdefault(shard, found)

        file = patiently(opened, self.stopped)
        if file.size != self.contents.shard_bytes[shard]:
            raise self.changed(shard)
        return file


# --- the end of the program ----------------------------------------------------------------------

_reading: "weakref.WeakSet[StoreReads]" = weakref.WeakSet()
_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


def start_thread(work: Callable[[], None]) -> threading.Thread:
    """Start a thread that reads stores; it must end soon after its StoreReads was stopped."""
    # A daemon: the end of a program must not wait until all that was asked for has come.
    thread = threading.Thread(target=work, daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


def _at_exit(reads: StoreReads) -> None:
    if not _reading:
        # pyarrow ends its clients at the exit; what is registered later is called earlier.
        import pyarrow.fs  # noqa: F401

        atexit.unregister(_end)
        atexit.register(_end)
    _reading.add(reads)


def _end() -> None:
    for reads in list(_reading):
        reads.stop()
    for thread in list(_threads):
        thread.join(_EXIT_SECONDS)
