"""Images of shards in an object store: out of this machine's cache, or read one by one."""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipelines.index import Contents, DataIndex
from pipelines.inspection import inspect_bytes
from pipelines.remote.fetching import ShardFetcher, fetcher_of
from pipelines.remote.shard_cache import ShardCache
from pipelines.remote.store_reads import StoreReads
from pipelines.samples import Shards

REQUEST_BYTES = 32 << 10  # that come in about the time that a request takes to be answered
AHEAD_BATCHES = 8  # that are known, and whose images are read, before they are asked for
SINGLE_SHARE = 0.1  # of the bytes that come, for images that cannot wait for their shards
PATIENCE = 10.0  # seconds that a batch waits for shards at most
KEPT_BYTES = 2**28  # of a set's images that are read without a cache, so much is kept in memory
Ids = NDArray[np.int64]


@dataclass
class _KeptImages:
    """Encoded images of one set by their ids, and how many bytes they are."""

    images: dict[int, bytes] = field(default_factory=dict)
    size: int = 0

    def add(self, ids: list[int], images: list[bytes]) -> None:
        for sample, image in zip(ids, images, strict=True):
            if sample not in self.images and self.size + len(image) <= KEPT_BYTES:
                self.images[sample] = image
                self.size += len(image)


# By the set's digests, which all indexes of the same images in this process share.
_kept_of: "weakref.WeakKeyDictionary[Contents, _KeptImages]" = weakref.WeakKeyDictionary()


class _NotHereError(Exception):
    """A shard is not in the cache, or not any more."""


class RemoteShards(Shards):
    """Images in tar files of an object store; the order and the bytes are those of a folder.

    ids        all samples that will be asked for, ascending
    upcoming   the ids of one `take` after the other
    cache      fetches whole shards, the first needed first, and keeps them; None, for few images:
               every one is read by itself, and the first KEPT_BYTES stay in memory

    Images of REQUEST_BYTES or more, on average, are read one by one ahead of their batch, and kept
    as parts of their shards: nothing is fetched twice, and the link to the store is the only limit
    of the first epoch. Shards are completed while no batch waits.

    Of smaller images requests would be the limit. Whole shards are fetched then, and meanwhile
    single images with a tenth of what comes (SINGLE_SHARE), which is fetched twice. A batch waits
    until it may, or its shards are here, PATIENCE seconds at most.

    Images of shards for which the cache has no room are always read one by one.

    `take` raises what ShardFetcher and StoreReads do.
    """

    def __init__(
        self, index: DataIndex, ids: Ids, upcoming: Iterable[Ids], cache: ShardCache | None
    ) -> None:
        super().__init__(index)
        assert index.shard is not None
        self._reads = StoreReads(index)
        self._fetcher: ShardFetcher | None = None
        self._upcoming: Iterator[Ids] | None = iter(upcoming)
        self._planned: deque[tuple[Ids, dict[int, Future[bytes]]]] = deque()
        self._wanted = np.unique(index.shard[ids])
        self._kept: _KeptImages | None = None
        self._one_by_one = int(index.file_bytes[ids].sum()) >= REQUEST_BYTES * len(ids)
        if cache is None:
            self._kept = _kept_of.setdefault(self._reads.contents, _KeptImages())
        else:
            self._fetcher = fetcher_of(index, cache)
        self._plan()
        if self._fetcher is not None:
            for some, _ in self._planned:
                self._fetcher.ask(index.shard[some].tolist())
            self._fetcher.ask(self._wanted.tolist())
        weakref.finalize(self, self._reads.stop)

    def take(self, ids: Ids) -> list[NDArray[np.uint8]]:
        if self._upcoming is None:  # all shards were here
            try:
                return super().take(ids)
            except _NotHereError:  # somebody has emptied the cache
                pass
        promised = self._promised(ids)
        missing = self._missing(ids)
        if self._fetcher is not None and missing:
            self._fetcher.ask(missing, urgent=True)
            if not self._one_by_one:
                self._wait(self._fetcher, ids, missing)
        data: dict[int, bytes | Future[bytes]] = {}
        for sample in ids.tolist():
            data[sample] = promised.get(sample) or self._read_soon(sample)
        found = [_result(data[sample]) for sample in ids.tolist()]
        if self._kept is not None:
            self._kept.add(ids.tolist(), found)
        if self._fetcher is not None and self._fetcher.here[self._wanted].all():
            self._upcoming = None
            self._planned.clear()
        return [np.frombuffer(image, dtype=np.uint8) for image in found]

    def _wait(self, fetcher: ShardFetcher, ids: Ids, missing: list[int]) -> None:
        """Wait for shards, or until their images may be read one by one."""
        index = self._index
        assert index.shard is not None
        within = index.shard[ids]
        # What has no room waits for nothing, and was read ahead.
        coming = [shard for shard in missing if not fetcher.has_no_room(shard)]

        def needed() -> int:
            return int(index.file_bytes[ids[np.isin(within, coming) & ~fetcher.here[within]]].sum())

        fetcher.wait(
            coming,
            PATIENCE,
            lambda: fetcher.read_bytes + needed() <= SINGLE_SHARE * fetcher.fetched_bytes,
        )
        fetcher.read_bytes += needed()

    def explain(self, sample: int) -> str | None:
        fault = inspect_bytes(_result(self._read_soon(sample))).fault
        where = self._index.place(sample)
        return None if fault is None else f"image {where}: changed since it was indexed: {fault}"

    def _opened(self, shard: int) -> int:
        handle = None if self._fetcher is None else self._fetcher.open(shard)
        if handle is None:
            raise _NotHereError
        return handle

    def _missing(self, ids: Ids) -> list[int]:
        """The shards of these samples that are not here."""
        assert self._index.shard is not None
        shards = np.unique(self._index.shard[ids])
        if self._fetcher is None:
            return shards.tolist()
        return shards[~self._fetcher.here[shards]].tolist()

    def _read_soon(self, sample: int) -> "bytes | Future[bytes]":
        """An image, out of memory, the cache, or the store."""
        if self._kept is not None and sample in self._kept.images:
            return self._kept.images[sample]
        shard, _, _ = self._place(sample)
        if self._fetcher is not None and self._fetcher.here[shard]:
            try:
                return self._read(sample)
            except _NotHereError:
                pass
        if self._fetcher is not None and self._one_by_one:
            return self._fetcher.image_soon(sample)
        return self._alone(sample)

    def _promised(self, ids: Ids) -> "dict[int, Future[bytes]]":
        """What is being read already of the batch that was planned for now."""
        if self._upcoming is None:
            return {}
        self._plan()
        planned, promised = self._planned.popleft()
        assert np.array_equal(planned, ids), "another batch than was announced"
        return promised

    def _plan(self) -> None:
        """Look AHEAD_BATCHES ahead, and begin to read images that do not come with their shard."""
        assert self._upcoming is not None
        while len(self._planned) < AHEAD_BATCHES:
            ids = next(self._upcoming, None)
            if ids is None:
                return
            self._planned.append((ids, dict(self._begun(ids))))

    def _begun(self, ids: Ids) -> "Iterator[tuple[int, Future[bytes]]]":
        """Begin to read those of these samples that do not come with their shard."""
        for sample in ids.tolist():
            shard, _, _ = self._place(sample)
            if self._kept is not None and sample in self._kept.images:
                continue
            fetcher = self._fetcher
            if fetcher is None or fetcher.has_no_room(shard):
                yield sample, self._alone(sample)
            elif self._one_by_one and not fetcher.here[shard]:
                yield sample, fetcher.image_soon(sample)

    def _alone(self, sample: int) -> "Future[bytes]":
        """Begin to read an image that no cache holds."""
        return self._reads.image_soon(*self._place(sample), sample)


def _result(image: "bytes | Future[bytes]") -> bytes:
    return image if isinstance(image, bytes) else image.result()
