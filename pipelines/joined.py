"""Streams of training batches as one: labelled images beside unlabelled ones, or after them."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch

from pipelines.loader import Batch, TrainLoader
from sbf_dist.errors import UserError


class JoinedLoader:
    """An endless iterator that joins one batch of each loader into one batch.

    The state is the loaders' states, in their order.
    """

    def __init__(self, loaders: Sequence[TrainLoader]) -> None:
        assert loaders, "nothing to join"
        self._loaders = list(loaders)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batches = [next(loader) for loader in self._loaders]
        if len(batches) == 1:
            return batches[0]
        whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        if "mixup_partner" in whole:  # places in a batch: they move with what stands before it
            sizes = [len(batch["id"]) for batch in batches]
            whole["mixup_partner"] = torch.cat(
                [
                    batch["mixup_partner"] + before
                    for batch, before in zip(batches, accumulate(sizes, initial=0), strict=False)
                ]
            )
        return whole

    @property
    def samples_seen(self) -> int:
        """Number of samples returned so far, over all ranks."""
        return sum(loader.samples_seen for loader in self._loaders)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"streams": [loader.state_dict() for loader in self._loaders]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; UserError also for another number of loaders."""
        if len(state["streams"]) != len(self._loaders):
            raise UserError(
                f"checkpoint: training read {len(state['streams'])} streams of images, now it "
                f"reads {len(self._loaders)}; give as many workers as before"
            )
        for loader, own in zip(self._loaders, state["streams"], strict=True):
            loader.load_state_dict(own)

    def close(self) -> None:
        """Release DALI's threads and buffers."""
        for loader in self._loaders:
            loader.close()


class LoadersInTurn:
    """Batches of one loader, and after `samples` samples, over all ranks, those of another.

    A batch of the second says so: it has the entry `mark`. The state is that of both: which of them
    comes next follows from what both have given. With a larger `samples` than before the first one
    goes on, until both together have given as many.
    """

    def __init__(self, first: JoinedLoader, then: JoinedLoader, *, samples: int, mark: str) -> None:
        self._first, self._then = first, then
        self._samples = samples
        self._mark = mark

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._first.samples_seen + self._then.samples_seen < self._samples:
            return next(self._first)
        self._first.close()
        return next(self._then) | {self._mark: torch.ones(())}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return self._first.state_dict() | {"then": self._then.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; UserError as JoinedLoader's."""
        self._first.load_state_dict(state)
        self._then.load_state_dict(state["then"])

    def close(self) -> None:
        """Release DALI's threads and buffers."""
        self._first.close()
        self._then.close()
