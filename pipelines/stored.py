"""Where the images of an index are read from: files, shards in a folder or in an object store."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pipelines.index import DataIndex
from pipelines.remote.remote_shards import RemoteShards
from pipelines.remote.shard_cache import ShardCache
from pipelines.samples import Files, Samples, Shards
from sbf_dist.object_storage import ObjectFolder

Ids = NDArray[np.int64]


def stored_samples(
    index: DataIndex, ids: Ids, upcoming: Iterable[Ids], cache: ShardCache | None
) -> Samples:
    """Return the images `ids`, which will be asked for batch by batch as `upcoming` gives them.

    `cache` is for what comes out of an object store, see RemoteShards; a folder needs none.
    """
    if isinstance(index.root, ObjectFolder):
        return RemoteShards(index, ids, upcoming, cache)
    return Shards(index) if index.shards else Files(index)
