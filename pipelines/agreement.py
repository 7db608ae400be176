"""Whether all workers see the same images."""

import numpy as np
import torch
import torch.distributed as dist

from pipelines.index import DataIndex
from sbf_dist.errors import UserError
from sbf_dist.object_storage import ObjectFolder

_NUM_CHECKED_FILES = 32


def check_workers_agree(index: DataIndex, device: torch.device | str = "cpu") -> None:
    """Raise on every worker if one has another index, or other files below the root.

    Of the files, 32 that are spread over the list are looked at: whether they are there, with the
    size that was indexed. Every worker of the process group must call this; `device` is one that
    the group's backend can send from.
    """
    digest = np.frombuffer(bytes.fromhex(index.digest), dtype=np.uint8)
    mine = torch.from_numpy(np.append(digest, len(_changed_files(index))).astype(np.uint8)).to(
        device
    )
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    for worker, theirs in enumerate(every):
        if not torch.equal(theirs[:-1], every[0][:-1]):
            raise UserError(
                f"data {index.root}: worker {worker} has another index than worker 0; all workers "
                "must use the same run folder, on a shared disk"
            )
    for worker, theirs in enumerate(every):
        if theirs[-1]:
            seen = min(_NUM_CHECKED_FILES, len(index))
            raise UserError(
                f"data {index.root}: on worker {worker}, {int(theirs[-1])} of {seen} checked files "
                "are missing or have another size than in the index; every worker needs the same "
                "images"
            )


def _changed_files(index: DataIndex) -> list[str]:
    """Of some samples, the files or shards that are not as they were indexed.

    None in an object store, which is the same for all: what comes out of it is checked by digest.
    """
    if isinstance(index.root, ObjectFolder):
        return []
    changed = []
    for sample in np.unique(np.linspace(0, len(index) - 1, _NUM_CHECKED_FILES).astype(np.int64)):
        shard = -1 if index.shard is None else int(index.shard[sample])
        name = index.files[sample] if shard < 0 else index.shards[shard]
        least = int(index.file_bytes[sample])
        if shard >= 0 and index.offset is not None:
            least += int(index.offset[sample])
        try:
            size = (index.root / name).stat().st_size
        except OSError:
            size = -1
        if size < least or (shard < 0 and size != least):
            changed.append(name)
    return changed
