"""Batches for training and evaluation: who gets which sample, in flight and in the state."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.augmentation import draw_views, only_crops
from pipelines.flight import Flight
from pipelines.graphs import STRONG_PREFIX, Form, crop_graph, evaluate_graph, train_graph
from pipelines.index import UNKNOWN, DataIndex
from pipelines.memory import decode_all
from pipelines.mixup import draw_mixup
from pipelines.order import SampleStream, evaluation_shard, rank_start
from pipelines.reader import Reader, check_count
from pipelines.resizing import resized_batch
from pipelines.samples import Pixels, Samples
from pipelines.stored import stored_samples
from sbf_dist.errors import UserError
from sbf_dist.settings import Augmentation, View

Batch = dict[str, torch.Tensor]


class TrainLoader:
    """An endless iterator of shuffled, augmented training batches of one rank.

    A batch is {"image": (b, 3, s, s) in channels_last, "label": int64 (b,), "id": int64 (b,)}, on
    the reader's device and of its dtype, with b = batch_size always and s = view.image_size.
    Samples of the part "unlabelled" have the label −1, also where the index knows their class. All
    ranks together give every sample of `parts` exactly once per epoch; batches run over epoch
    borders. With mixup or cutmix, a batch also says which images are combined and how (see
    mixup.draw_mixup). With `strong`, another augmentation, it has a second view of each image,
    "strong", of the same decoded picture; the first views are what they would be without.

    With the reader's cache, batches are the same but for the rounding of JPEG's colours at the
    edges of crops.

    The state counts the samples that were handed out, over all ranks, not the prefetched ones.
    Loaded on any number of ranks and with any batch size, it goes on with exactly the samples that
    were not handed out yet; the views of a sample depend on the seed and its place in the stream
    alone, so that they too are what they would have been.

    UserError: parts that are unknown, empty or "validation", numbers out of range; in
    __next__, an image that has vanished or was damaged since it was indexed.
    """

    def __init__(
        self,
        index: DataIndex,
        parts: Sequence[str],
        reader: Reader,
        *,
        batch_size: int,
        view: View,
        augmentation: Augmentation,
        seed: int,
        strong: Augmentation | None = None,
    ) -> None:
        check_count("batch_size", batch_size)
        if augmentation.mixes and batch_size % 2:
            raise UserError(
                f"batch_size {batch_size} of one worker: mixup and cutmix mix pairs of images; it "
                "must be even"
            )
        if not 0 <= seed < 2**64:
            raise UserError(f"seed {seed}: must be 0 <= seed < 2**64")
        self._index = index
        self._parts = sorted(set(parts))
        self._stream = SampleStream(_training_ids(index, self._parts), seed)
        self._labels = index.labels.copy()
        self._labels[index.parts["unlabelled"]] = UNKNOWN
        self._reader, self._view, self._batch_size = reader, view, batch_size
        self._augmentation, self._strong = augmentation, strong
        self._pixels: Pixels | None = None
        self._handed_out = 0
        self._submitted = 0
        self._flight: Flight | None = None

    @property
    def samples_per_epoch(self) -> int:
        return len(self._stream.ids)

    @property
    def samples_seen(self) -> int:
        """Number of samples returned so far, over all ranks."""
        return self._handed_out

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._flight is None:
            self._flight = self._start()
        try:
            ids, views = self._flight.take()
        except Exception:
            self.close()  # DALI's pipeline is of no use after an error
            raise
        self._submit(self._flight)
        batch = _batch(views[0], self._labels[ids], ids)
        if self._strong is not None:
            batch["strong"] = views[1]
        if self._augmentation.mixes:
            batch |= self._mixup()
        self._handed_out += self._batch_size * self._reader.world_size
        return batch

    def _mixup(self) -> Batch:
        """How mixup or cutmix combines the images of the next batch."""
        numbers = draw_mixup(
            self._augmentation,
            batch_size=self._batch_size,
            image_size=self._view.image_size,
            seed=self._stream.seed,
            position=rank_start(self._handed_out, self._batch_size, self._reader.rank),
        )
        return {
            key: torch.from_numpy(value).to(self._reader.device, non_blocking=True)
            for key, value in numbers.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: plain numbers and strings, the same on all ranks.

        "epoch" and "position" are where the next global batch begins: epochs that are over, samples
        of this one that were handed out over all ranks.
        """
        epoch, position = divmod(self._handed_out, self.samples_per_epoch)
        return {
            "epoch": epoch,
            "position": position,
            "seed": self._stream.seed,
            "parts": list(self._parts),
            "digest": self._index.digest,
            "world_size": self._reader.world_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; what is in flight is dropped.

        UserError if the state is of other data, another seed or other parts.
        """
        mine = self.state_dict()
        for key, what in (("digest", "data"), ("seed", "seed"), ("parts", "parts")):
            if state[key] != mine[key]:
                raise UserError(
                    f"checkpoint: its loader state is of {what} {state[key]}, this run has "
                    f"{mine[key]}; resume with the {what} of the checkpoint, or start again"
                )
        self.close()
        self._handed_out = int(state["epoch"]) * self.samples_per_epoch + int(state["position"])

    def close(self) -> None:
        """Release DALI's threads and buffers; the next batch starts them again."""
        self._flight = None

    def _start(self) -> Flight:
        sizes = self._index.sizes[self._stream.ids]
        samples = self._samples()
        form = Form.of(
            self._view,
            self._reader,
            batch_size=self._batch_size,
            source=samples.source,
            largest=_largest(sizes),
            fits=bool((sizes == self._view.image_size).all()),
        )
        if self._resizes_itself:
            finish = partial(resized_batch, form=form)
            flight = Flight(crop_graph(form), samples, self._reader, finish=finish)
        else:
            pipe = train_graph(form, self._augmentation, self._strong)
            flight = Flight(pipe, samples, self._reader)
        self._submitted = self._handed_out
        for _ in range(self._reader.prefetch):
            self._submit(flight)
        return flight

    @property
    def _resizes_itself(self) -> bool:
        """Whether PyTorch resizes the crops: faster where the view needs nothing else."""
        plain = only_crops(self._augmentation) and self._strong is None
        return plain and self._reader.on_cpu

    def _samples(self) -> Samples:
        if self._reader.cache == "none":
            upcoming = self._upcoming(self._handed_out)
            return stored_samples(self._index, self._stream.ids, upcoming, self._reader.shard_cache)
        if self._pixels is None:
            self._pixels = decode_all(self._index, self._stream.ids, self._reader)
        return self._pixels

    def _upcoming(self, position: int) -> Iterator[NDArray[np.int64]]:
        """The ids of this rank's batches from the global batch at `position` on, without end."""
        stream = SampleStream(self._stream.ids, self._stream.seed)
        while True:
            start = rank_start(position, self._batch_size, self._reader.rank)
            yield stream.take(start, self._batch_size)
            position += self._batch_size * self._reader.world_size

    def _submit(self, flight: Flight) -> None:
        start = rank_start(self._submitted, self._batch_size, self._reader.rank)
        ids = self._stream.take(start, self._batch_size)
        inputs: dict[str, NDArray[Any]] = {}
        asked = [(self._augmentation, "")]
        asked += [(self._strong, STRONG_PREFIX)] if self._strong is not None else []
        for augmentation, prefix in asked:
            views = draw_views(
                augmentation,
                self._index.sizes[ids],
                image_size=self._view.image_size,
                seed=self._stream.seed,
                position=start,
                strong=prefix == STRONG_PREFIX,
            )
            inputs |= {prefix + key: value for key, value in views.inputs(augmentation).items()}
        aside = inputs.pop("mirror") if self._resizes_itself else None
        flight.submit(ids, inputs, aside)
        self._submitted += self._batch_size * self._reader.world_size


class EvalLoader:
    """One rank's share of a part, in order, once per iteration.

    Batches are as TrainLoader's, without augmentation, with true labels (−1 where the index knows
    none); the last one may be smaller. All ranks together give every sample exactly once; a rank
    whose share is empty gives no batch. len() is the number of batches. `crop` is the share of the
    short side that the centre crop shows. Each iteration builds its own DALI pipeline and releases
    it at its end, so that nothing is held between evaluations.

    UserError as TrainLoader's.
    """

    def __init__(
        self,
        index: DataIndex,
        part: str,
        reader: Reader,
        *,
        batch_size: int,
        view: View,
        crop: float = 0.875,
    ) -> None:
        check_count("batch_size", batch_size)
        if not 0 < crop <= 1:
            raise UserError(f"crop {crop}: must be in (0, 1]")
        self._index = index
        self._ids = evaluation_shard(_part(index, part), reader.rank, reader.world_size)
        self._reader, self._view, self._batch_size, self._crop = reader, view, batch_size, crop

    def __len__(self) -> int:
        return math.ceil(len(self._ids) / self._batch_size)

    @property
    def samples(self) -> int:
        """Samples of this rank."""
        return len(self._ids)

    def __iter__(self) -> Iterator[Batch]:
        if not len(self):
            return
        reader = replace(self._reader, prefetch=min(self._reader.prefetch, len(self)))
        starts = range(0, len(self._ids), self._batch_size)
        batches = [self._ids[start : start + self._batch_size] for start in starts]
        samples = stored_samples(self._index, self._ids, batches, reader.shard_cache)
        form = Form.of(
            self._view,
            reader,
            batch_size=self._batch_size,
            source=samples.source,
            largest=_largest(self._index.sizes[self._ids]),
        )
        flight = Flight(evaluate_graph(form, crop=self._crop), samples, reader)
        waiting = iter(batches)
        for _ in range(reader.prefetch):
            flight.submit(next(waiting), {})
        for _ in range(len(self)):
            ids, (images,) = flight.take()
            following = next(waiting, None)
            if following is not None:
                flight.submit(following, {})
            yield _batch(images, self._index.labels[ids], ids)


def _batch(images: torch.Tensor, labels: NDArray[np.int64], ids: NDArray[np.int64]) -> Batch:
    return {
        "image": images,
        "label": torch.from_numpy(labels).to(images.device, non_blocking=True),
        "id": torch.from_numpy(ids.copy()).to(images.device, non_blocking=True),
    }


def _part(index: DataIndex, part: str) -> NDArray[np.int64]:
    if part not in index.parts:
        raise UserError(f"part {part!r}: there is {', '.join(sorted(index.parts))}")
    return index.parts[part]


def _training_ids(index: DataIndex, parts: Sequence[str]) -> NDArray[np.int64]:
    if "validation" in parts:
        raise UserError("parts: 'validation' is for evaluation; train on labelled, unlabelled")
    ids = np.sort(np.concatenate([_part(index, part) for part in parts] or [np.zeros(0, np.int64)]))
    if not len(ids):
        raise UserError(f"parts {list(parts)}: {index.root} has no such image to train on")
    return ids


def _largest(sizes: NDArray[np.int64]) -> tuple[int, int]:
    height, width = sizes.max(axis=0)
    return int(height), int(width)
