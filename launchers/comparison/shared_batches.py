"""The same batches for many trainings: loaded once where they fit into memory."""

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

Batch = dict[str, Tensor]
MAX_MEMORY_BYTES = 2**30


class SharedBatches:
    """The first `count` batches of what `load` begins anew; every iteration gives the same ones.

    They are kept from the first iteration on if all of them fit into `memory` bytes, else loaded
    again: `load` must be deterministic.
    """

    def __init__(
        self, load: Callable[[], Iterable[Batch]], count: int, memory: int = MAX_MEMORY_BYTES
    ) -> None:
        self._load = load
        self._count = count
        self._memory = memory
        self._kept: list[Batch] = []
        self._fits: bool | None = None  # unknown before the first batch

    def __iter__(self) -> Iterator[Batch]:
        if self._count and len(self._kept) == self._count:
            yield from self._kept
            return
        self._kept = []
        stream = iter(self._load())
        for _ in range(self._count):
            batch = next(stream)
            if self._fits is None:
                size = sum(tensor.nbytes for tensor in batch.values())
                self._fits = size * self._count <= self._memory
            if self._fits:
                # DALI takes its buffers back when a batch dies.
                batch = {name: tensor.clone() for name, tensor in batch.items()}
                self._kept.append(batch)
            yield batch
