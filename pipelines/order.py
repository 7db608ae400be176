"""The order in which training sees its samples: pure index arithmetic."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class SampleStream:
    """The endless stream of shuffled epochs over `ids`.

    Epoch e is one permutation of all ids, drawn by Philox with the key (seed, e): it depends on
    nothing else, so any number of ranks, at any time, agree on what stands at which position.
    `ids` is int64 (n,), n > 0, without duplicates; `seed` is 0 <= seed < 2**64.
    """

    ids: NDArray[np.int64]
    seed: int
    _epochs: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def epoch(self, number: int) -> NDArray[np.int64]:
        """The ids of one epoch in their order, int64 (n,)."""
        if number not in self._epochs:
            # A stream moves forward: the epoch before and this one are all that a batch touches.
            self._epochs = {k: v for k, v in self._epochs.items() if k == number - 1}
            generator = np.random.Generator(
                np.random.Philox(key=np.array([self.seed, number], dtype=np.uint64))
            )
            self._epochs[number] = generator.permutation(self.ids)
        return self._epochs[number]

    def take(self, position: int, count: int) -> NDArray[np.int64]:
        """The ids at positions position … position + count − 1, over epoch borders."""
        pieces = []
        while count > 0:
            number, offset = divmod(position, len(self.ids))
            piece = self.epoch(number)[offset : offset + count]
            pieces.append(piece)
            position += len(piece)
            count -= len(piece)
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


def rank_start(position: int, batch_size: int, rank: int) -> int:
    """Where rank `rank` reads its batch_size samples of the global batch that starts at position.

    The global batch of step k starts at k · batch_size · world_size and each rank reads its
    contiguous slice of it: no sample is given twice and none is left out.
    """
    return position + rank * batch_size


def evaluation_shard(ids: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """The samples that one rank evaluates: every world_size-th, each sample on one rank only."""
    return ids[rank::world_size]
