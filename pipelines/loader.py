"""Batches for training and evaluation: who gets which sample, in flight and in the state."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.pipeline import Pipeline

from pipelines.augmentation import Augmentation, draw_views
from pipelines.graphs import evaluate_graph, train_graph
from pipelines.index import UNKNOWN, DataIndex
from pipelines.inspection import inspect_image
from pipelines.order import SampleStream, evaluation_shard, rank_start
from sbf_dist.errors import UserError

Batch = dict[str, torch.Tensor]


class TrainLoader:
    """An endless iterator of shuffled, augmented training batches of one rank.

    A batch is {"image": float32 (b, 3, s, s) in channels_last, "label": int64 (b,), "id": int64
    (b,)}, all on `device`, with b = batch_size always. Samples of the part "unlabelled" have the
    label −1, also where the index knows their class. All ranks together give every sample of
    `parts` exactly once per epoch; batches run over epoch borders.

    `mean` and `std` are those of images in [0, 1]; `threads` are DALI's, beside the caller's own;
    `prefetch` batches are kept in flight. `device` is a torch device, "cpu" or "cuda[:n]".

    The state counts the samples that were handed out, over all ranks, not the prefetched ones.
    Loaded on any number of ranks and with any batch size, it goes on with exactly the samples that
    were not handed out yet; the views of a sample depend on the seed and its place in the stream
    alone, so that they too are what they would have been.

    UserError: parts that are unknown, empty or "validation", sizes and moments out of range; in
    __next__, an image that has vanished or was damaged since it was indexed.
    """

    def __init__(
        self,
        index: DataIndex,
        parts: Sequence[str],
        *,
        batch_size: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation,
        seed: int,
        rank: int,
        world_size: int,
        threads: int,
        device: torch.device | str = "cpu",
        prefetch: int = 2,
    ) -> None:
        _check_settings(
            mean,
            std,
            batch_size=batch_size,
            image_size=image_size,
            threads=threads,
            prefetch=prefetch,
        )
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        if not 0 <= seed < 2**64:
            raise UserError(f"seed {seed}: must be 0 <= seed < 2**64")
        self._index = index
        self._parts = sorted(set(parts))
        self._stream = SampleStream(_training_ids(index, self._parts), seed)
        self._labels = index.labels.copy()
        self._labels[index.parts["unlabelled"]] = UNKNOWN
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._image_size, self._mean, self._std = image_size, list(mean), list(std)
        self._augmentation = augmentation
        self._threads, self._device, self._prefetch = threads, torch.device(device), prefetch
        self._handed_out = 0
        self._submitted = 0
        self._flight: _Flight | None = None

    @property
    def samples_per_epoch(self) -> int:
        return len(self._stream.ids)

    @property
    def samples_seen(self) -> int:
        """Samples handed out so far, over all ranks."""
        return self._handed_out

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._flight is None:
            self._flight = self._take_off()
        try:
            ids, images = self._flight.take()
        except Exception:
            self.close()  # DALI's pipeline is of no use after an error
            raise
        self._submit(self._flight)
        self._handed_out += self._batch_size * self._world_size
        return _batch(images, self._labels[ids], ids)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: plain numbers and strings, the same on all ranks."""
        return {
            "samples_seen": self._handed_out,
            "seed": self._stream.seed,
            "parts": list(self._parts),
            "digest": self._index.digest,
            "world_size": self._world_size,
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
                    f"{mine[key]}; resume with the {what} that the run began with, or start anew"
                )
        self.close()
        self._handed_out = int(state["samples_seen"])

    def close(self) -> None:
        """Let go of DALI's threads and buffers; the next batch starts them again."""
        self._flight = None

    def _take_off(self) -> "_Flight":
        pipe = train_graph(
            batch_size=self._batch_size,
            image_size=self._image_size,
            mean=self._mean,
            std=self._std,
            augmentation=self._augmentation,
            threads=self._threads,
            device_id=_device_id(self._device),
            prefetch=self._prefetch,
        )
        flight = _Flight(pipe, self._index, self._device, self._prefetch)
        self._submitted = self._handed_out
        for _ in range(self._prefetch):
            self._submit(flight)
        return flight

    def _submit(self, flight: "_Flight") -> None:
        start = rank_start(self._submitted, self._batch_size, self._rank)
        ids = self._stream.take(start, self._batch_size)
        views = draw_views(
            self._augmentation,
            self._index.sizes[ids],
            image_size=self._image_size,
            seed=self._stream.seed,
            position=start,
        )
        inputs = {"anchor": views.anchor, "shape": views.shape, "mirror": views.mirror}
        if self._augmentation.warps:
            inputs["matrix"] = views.matrix
        if self._augmentation.color > 0:
            inputs["color"] = views.color
        flight.submit(ids, inputs)
        self._submitted += self._batch_size * self._world_size


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
        *,
        batch_size: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        rank: int,
        world_size: int,
        threads: int,
        device: torch.device | str = "cpu",
        crop: float = 0.875,
        prefetch: int = 2,
    ) -> None:
        _check_settings(
            mean,
            std,
            batch_size=batch_size,
            image_size=image_size,
            threads=threads,
            prefetch=prefetch,
        )
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        if not 0 < crop <= 1:
            raise UserError(f"crop {crop}: must be in (0, 1]")
        self._index = index
        self._ids = evaluation_shard(_part(index, part), rank, world_size)
        self._batch_size, self._image_size, self._crop = batch_size, image_size, crop
        self._mean, self._std = list(mean), list(std)
        self._threads, self._device, self._prefetch = threads, torch.device(device), prefetch

    def __len__(self) -> int:
        return math.ceil(len(self._ids) / self._batch_size)

    @property
    def samples(self) -> int:
        """Samples of this rank."""
        return len(self._ids)

    def __iter__(self) -> Iterator[Batch]:
        if not len(self):
            return
        depth = min(self._prefetch, len(self))
        pipe = evaluate_graph(
            batch_size=self._batch_size,
            image_size=self._image_size,
            crop=self._crop,
            mean=self._mean,
            std=self._std,
            threads=self._threads,
            device_id=_device_id(self._device),
            prefetch=depth,
        )
        flight = _Flight(pipe, self._index, self._device, depth)
        starts = iter(range(0, len(self._ids), self._batch_size))
        for _ in range(depth):
            self._submit(flight, next(starts))
        for _ in range(len(self)):
            ids, images = flight.take()
            start = next(starts, None)
            if start is not None:
                self._submit(flight, start)
            yield _batch(images, self._index.labels[ids], ids)

    def _submit(self, flight: "_Flight", start: int) -> None:
        flight.submit(self._ids[start : start + self._batch_size], {})


class _Flight:
    """The batches that one DALI pipeline is working on, first in, first out.

    `depth` batches must be submitted before the first take.
    """

    def __init__(self, pipe: Pipeline, index: DataIndex, device: torch.device, depth: int) -> None:
        self._pipe, self._index, self._device, self._depth = pipe, index, device, depth
        self._root = str(index.root)
        self._pending: deque[NDArray[np.int64]] = deque()
        self._started = False

    def submit(self, ids: NDArray[np.int64], inputs: dict[str, NDArray[Any]]) -> None:
        # Plain strings: pathlib's joins cost a quarter of the time of a batch of small images.
        names = [f"{self._root}/{self._index.files[i]}".encode() for i in ids]
        self._pipe.feed_input("path", [np.frombuffer(name, dtype=np.uint8) for name in names])
        for name, values in inputs.items():
            self._pipe.feed_input(name, values)
        self._pending.append(ids)
        # DALI's first schedule_run runs the pipeline as often as its queue is deep.
        if self._started or len(self._pending) == self._depth:
            self._pipe.schedule_run()
            self._started = True

    def take(self) -> tuple[NDArray[np.int64], torch.Tensor]:
        """The ids and images (b, 3, s, s) of the oldest batch."""
        try:
            if self._device.type == "cuda":
                (images,) = self._pipe.share_outputs(torch.cuda.current_stream(self._device))
            else:
                (images,) = self._pipe.share_outputs()
        except RuntimeError as error:
            raise self._explained(error) from error
        # No copy: the tensor keeps DALI's buffer, which goes back to DALI when the tensor dies.
        tensor = torch.from_dlpack(images.as_tensor())
        self._pipe.release_outputs()
        # Channels last in memory, as DALI made them; only the view is the other way round.
        return self._pending.popleft(), tensor.permute(0, 3, 1, 2)

    def _explained(self, error: RuntimeError) -> Exception:
        """DALI's error in the user's terms: the file that is to blame, if one is."""
        for ids in self._pending:
            for path in (self._index.root / self._index.files[i] for i in ids):
                if not path.is_file():
                    return UserError(
                        f"image {path}: has vanished since it was indexed; put it back or index "
                        "the images again"
                    )
                fault = inspect_image(path).fault
                if fault is not None:
                    return UserError(f"image {path}: changed since it was indexed: {fault}")
        return error


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


def _check_settings(mean: Sequence[float], std: Sequence[float], **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(f"mean {list(mean)}, std {list(std)}: must be three numbers each, std > 0")


def _device_id(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UserError(f"device {device}: must be cpu, or cuda where PyTorch sees a CUDA device")
    return torch.cuda.current_device() if device.index is None else device.index
