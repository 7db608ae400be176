"""Shards, and their images, on their way from an object store to this machine's cache."""

import logging
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from pipelines.index import NO_SHARD, Contents, DataIndex
from pipelines.remote.shard_cache import OtherContentError, Outcome, ShardCache
from pipelines.remote.store_reads import StoreReads, start_thread
from pipelines.remote.unfinished import BLOCK_BYTES

_log = logging.getLogger(__name__)

THREADS = 4  # of a process; each fetches a shard
_ELSEWHERE_SECONDS = 0.2  # between looks at a shard that another process fetches
_FULL_SECONDS = 60.0  # between looks whether another run has ended and left room
_GB = 10**9
_AFTER_BYTES = 4 << 10  # between two images at most, so that the first brings what is between them


class ShardFetcher:
    """Fetches the shards of one set that were asked for, the most urgent first.

    Single images go before whole shards, and stay as parts of theirs.

    While it lives, none of the set's shards is removed from the cache. Its methods raise what
    fetching has raised in the background: UserError for a shard that is missing or changed and for
    the cache's disk, RunError where the store does not answer for minutes.

    here            bool, for each shard: whether it was in the cache when it was last looked for
    fetched_bytes   of shards, by this process
    read_bytes      of single images of shards that were on their way; counted by RemoteShards
    """

    def __init__(self, index: DataIndex, cache: ShardCache) -> None:
        self.reads, self.cache = StoreReads(index), cache
        self.here: NDArray[np.bool_] = np.zeros(len(index.shards), dtype=bool)
        self.fetched_bytes = self.read_bytes = 0
        self._contents: Contents = self.reads.contents
        self._index, self._after = index, _bytes_after(index)
        cache.check(max(self._contents.shard_bytes))
        self._resources = ExitStack()
        self._resources.enter_context(cache.using(self._contents.shard_digests))
        self._change = threading.Condition()
        self._wanted: dict[int, None] = {}  # in the order of need
        self._running: set[int] = set()
        self._given_up: set[int] = set()
        self._later: dict[int, float] = {}  # shard → when it is looked at again
        self._full_until = 0.0
        self._without_room: set[int] = set()
        self._error: BaseException | None = None
        self._threads = 0
        weakref.finalize(self, self._resources.close)

    def ask(self, shards: Iterable[int], *, urgent: bool = False) -> None:
        """Have shards fetched, behind those that were asked for before, or `urgent` before them."""
        with self._change:
            self._raise()
            new = {s: None for s in map(int, shards) if not self.here[s]}
            if self._full_until > time.monotonic():
                new = {s: None for s in new if s not in self._without_room}
            for shard in new:
                self._without_room.discard(shard)
            self._wanted = new | self._wanted if urgent else self._wanted | new
            while self._threads < min(THREADS, len(self._wanted)):
                self._threads += 1
                start_thread(self._work)

    def open(self, shard: int) -> int | None:
        """Return a descriptor of a shard, None if it is not here."""
        handle = self.cache.open(
            self._contents.shard_digests[shard], self._contents.shard_bytes[shard]
        )
        self.here[shard] = handle is not None
        return handle

    def image_soon(self, sample: int) -> "Future[bytes]":
        """Read one image in the background, and keep it in the cache if that has room."""
        return self.reads.soon(lambda: self._image(sample))

    def wait(
        self, shards: Iterable[int], seconds: float, enough: Callable[[], bool] = lambda: False
    ) -> None:
        """Wait until none of these shards is coming any more, or `enough`, `seconds` at most."""
        end = time.monotonic() + seconds
        waited_for = {int(shard) for shard in shards}
        with self._change:
            while not self._error and waited_for & self._wanted.keys() and not enough():
                left = end - time.monotonic()
                if left <= 0:
                    break
                self._change.wait(left)
            self._raise()

    def has_no_room(self, shard: int) -> bool:
        """Whether the cache had no room for a shard when it was last asked for."""
        with self._change:
            return shard in self._without_room

    def _image(self, sample: int) -> bytes:
        index = self._index
        assert index.shard is not None and index.offset is not None
        shard, offset = int(index.shard[sample]), int(index.offset[sample])
        count = int(index.file_bytes[sample])
        whole = (self._contents.shard_digests[shard], self._contents.shard_bytes[shard])
        kept = self.cache.read(*whole, offset, count)
        if kept is not None and self.reads.is_image(kept, sample):
            return kept
        after = int(self._after[sample])
        data = self.reads.image(shard, offset, count, sample, after=after)
        if not self.has_no_room(shard):
            outcome = self.cache.begin(*whole)
            if outcome is Outcome.BEGUN:
                self.cache.keep(*whole, offset, data)
            elif outcome is Outcome.NO_ROOM:
                with self._change:
                    self._wanted.pop(shard, None)
                    self._note_no_room(shard)
        return data[:count]

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        while True:
            with self._change:
                shard = self._next()
                if shard is None:
                    if self.reads.stopped.is_set() or not self._wanted.keys() - self._running:
                        self._threads -= 1
                        return
                    self._change.wait(_ELSEWHERE_SECONDS)
                    continue
                self._running.add(shard)
            outcome, error = None, None
            try:
                outcome = self._fetch(shard)
            except BaseException as raised:
                error = raised
            with self._change:
                self._running.discard(shard)
                self._note(shard, outcome, error)
                self._change.notify_all()

    def _next(self) -> int | None:
        now = time.monotonic()
        return next(
            (
                shard
                for shard in self._wanted
                if shard not in self._running and self._later.get(shard, 0) <= now
            ),
            None,
        )

    def _note(self, shard: int, outcome: Outcome | None, error: BaseException | None) -> None:
        given_up = shard in self._given_up
        self._given_up.discard(shard)
        if error is not None:
            if not given_up:
                self._error = error
                self._wanted.clear()
                # What others are still at brings no error of its own, unless it is asked for anew.
                self._given_up = set(self._running)
            return
        if outcome is Outcome.ELSEWHERE:
            self._later[shard] = time.monotonic() + _ELSEWHERE_SECONDS
            return
        self._wanted.pop(shard, None)
        if outcome is Outcome.HERE:
            self.here[shard] = True
        if outcome is Outcome.NO_ROOM:
            self._note_no_room(shard)

    def _note_no_room(self, shard: int) -> None:
        if not self._full_until:  # said once
            total = sum(self._contents.shard_bytes) / _GB
            _log.warning(
                "data.cache_dir %s: has no room for all shards of %s (%.3g GB; data.cache_gb); "
                "images of the others are read from the store one by one, in every epoch",
                self.cache.folder,
                self.reads.root,
                total,
            )
        self._without_room.add(shard)
        self._full_until = time.monotonic() + _FULL_SECONDS

    def _fetch(self, shard: int) -> Outcome:
        digest, size = self._contents.shard_digests[shard], self._contents.shard_bytes[shard]

        def read(offset: int, count: int) -> bytes:
            data = self.reads.read(shard, offset, count)
            with self._change:
                self.fetched_bytes += count
                self._change.notify_all()
            return data

        for final in (False, True):
            try:
                # Batches wait for single images.
                return self.cache.fetch(digest, size, read, wait=self.reads.wait_until_idle)
            except OtherContentError as error:
                if not final:
                    _log.warning(
                        "shard %s: came with the SHA-256 %s, not %s; fetching it again",
                        self.reads.named(shard),
                        error,
                        digest,
                    )
        raise self.reads.changed(shard)


def _bytes_after(index: DataIndex) -> NDArray[np.int64]:
    """How many bytes to read after each image: to the next, or to the end of its last block."""
    assert index.shard is not None and index.offset is not None and index.contents is not None
    after = -index.file_bytes % BLOCK_BYTES
    order = np.lexsort((index.offset, index.shard))
    order = order[index.shard[order] != NO_SHARD]
    first, second = order[:-1], order[1:]
    between = index.offset[second] - index.offset[first] - index.file_bytes[first]
    near = (index.shard[first] == index.shard[second]) & (between <= _AFTER_BYTES)
    after[first[near]] = between[near]
    return after


_fetchers: "weakref.WeakValueDictionary[Hashable, ShardFetcher]" = weakref.WeakValueDictionary()


def fetcher_of(index: DataIndex, cache: ShardCache) -> ShardFetcher:
    """Return this process's fetcher of a set, the same one for all loaders of it."""
    assert index.contents is not None
    key = (index.root, tuple(index.shards), tuple(index.contents.shard_digests), cache)
    fetcher = _fetchers.get(key)
    if fetcher is None:
        fetcher = _fetchers[key] = ShardFetcher(index, cache)
    return fetcher
