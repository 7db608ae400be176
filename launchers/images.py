"""Images in this process, without workers: for indexing, calibration and checking exports."""

import dataclasses
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from launchers.display import Display
from pipelines.index import INDEX, DataIndex
from pipelines.loader import EvalLoader
from pipelines.reader import Reader
from pipelines.remote.remote_shards import KEPT_BYTES
from pipelines.remote.shard_cache import ShardCache
from pipelines.roots import Root, root_of
from pipelines.sources import digits, photos
from pipelines.sources.folder import index_folder
from sbf_dist.compression.calibration import Calibration
from sbf_dist.errors import UserError
from sbf_dist.recipe import Data

BATCH_SIZE = 64
MAX_IMAGES_BYTES = 2**26  # of calibration images that are kept rather than decoded each time

_EMBEDDED = {"digits": digits.write, "photos": photos.write}


def index_images(data: Data, runs: Path, seed: int, display: Display) -> DataIndex:
    """Find and check a recipe's images and divide them into parts; embedded sets are written."""
    return index_folder(
        _place(data, runs),
        labelled_per_class=data.labelled_per_class,
        validation=data.validation,
        seed=seed,
        split=data.split,
        unlabelled=data.unlabelled,
        expected=data.expected,
        progress=images_read(display),
    )


def _place(data: Data, runs: Path) -> Path | str:
    """Return the folder or the address of the images; embedded sets are written."""
    place = data.root
    if data.source in _EMBEDDED:
        place = place or runs / "data" / data.source
        assert isinstance(place, Path), place
        _EMBEDDED[data.source](place)
    assert place is not None
    return place


def find_again(data: Data, runs: Path, folder: Path, seed: int) -> None:
    """Let the index in `folder`, if there is one, be of the recipe's images wherever they are now.

    A run's folder, or the images, may have been moved since. UserError where the images are not
    those that were indexed (in a folder by their names and sizes, in an object store by those in
    the list of the prepared set), and for a cache that holds none of their shards.
    """
    if not (folder / INDEX).exists():
        return
    index = DataIndex.load(folder)
    cache = shard_cache(data)
    if cache is not None and index.contents is not None:
        cache.check_gigabytes(max(index.contents.shard_bytes))
    if data.root is not None and _is_elsewhere(root_of(data.root), index.root):
        return  # a relative path, given in another folder
    root = root_of(_place(data, runs))
    if root == index.root:
        return
    if isinstance(root, Path):
        index.at(root).save(folder)
        return
    found = index_images(data, runs, seed, Display())
    if found.digest != index.digest:
        raise UserError(
            f"data {root}: holds other images, or in other shards, than {index.root}, which were "
            "indexed; prepare the new ones with --again prepare or under another name (name=…)"
        )
    found.save(folder)


def _is_elsewhere(wanted: Root, known: Root) -> bool:
    """Whether a folder is not there, and the one that was indexed is."""
    if isinstance(wanted, Path):
        return not wanted.is_dir() and isinstance(known, Path) and known.is_dir()
    return False


def shard_cache(data: Data) -> ShardCache | None:
    """Return this machine's cache of the recipe's shards; None where they lie in a folder."""
    if not isinstance(data.root, str):
        return None
    return ShardCache.at(data.cache_dir, data.cache_gb)


def with_embedded_images(data: Data, runs: Path, index: DataIndex) -> DataIndex:
    """Return the index of an embedded set as this machine has it, where it is written now.

    Images of other sources are where they are; the index is as it was.
    """
    if data.source not in _EMBEDDED or data.root is not None:
        return index
    root = runs.absolute() / "data" / data.source
    with (runs / ".data.lock").open("w") as lock:  # of all workers on this machine
        fcntl.flock(lock, fcntl.LOCK_EX)
        _EMBEDDED[data.source](root)
    return index if root == index.root else index.at(root)


def images_read(display: Display) -> Callable[[int, int], None]:
    """Return what shows on `display` how many images have been checked."""
    return lambda done, of: display.show({"title": "images", "step": done, "steps": of})


def calibration_images(data: Data, index: DataIndex, count: int, seed: int) -> Calibration:
    """Return `count` random training images as the student sees them in evaluation.

    Up to MAX_IMAGES_BYTES they are kept in memory, otherwise they are decoded each time that they
    are gone through.
    """
    ids = np.sort(np.concatenate([index.parts[part] for part in ("labelled", "unlabelled")]))
    drawn = np.random.default_rng(seed).choice(ids, min(count, len(ids)), replace=False)
    drawn.sort()
    if 4 * 3 * data.image_size**2 * len(drawn) <= MAX_IMAGES_BYTES:
        images = evaluation_images(data, index, drawn)
        return Calibration.of(images, batch=BATCH_SIZE, sources=drawn.tolist())
    loader = evaluation_loader(data, index, drawn)
    return Calibration(_Images(loader), sources=drawn.tolist())


def evaluation_images(data: Data, index: DataIndex, ids: np.ndarray) -> torch.Tensor:
    """Return the evaluation views of `ids`, (N, 3, H, W), in channels_last."""
    # DALI takes its buffers back when a batch dies.
    return torch.cat([images.clone() for images in _Images(evaluation_loader(data, index, ids))])


def evaluation_loader(
    data: Data,
    index: DataIndex,
    ids: np.ndarray,
    *,
    batch_size: int = BATCH_SIZE,
    device: torch.device | str = "cpu",
) -> EvalLoader:
    """Return the batches of `ids` as the student sees them in evaluation."""
    others = dict.fromkeys(("labelled", "unlabelled"), ids[:0])
    few = int(index.file_bytes[ids].sum()) <= KEPT_BYTES
    return EvalLoader(
        dataclasses.replace(index, parts=others | {"validation": ids}),
        "validation",
        Reader(
            threads=data.threads,
            device=device,
            # For few images of a store, whole shards would be fetched in vain.
            shard_cache=None if few else shard_cache(data),
        ),
        batch_size=batch_size,
        view=data.view,
        crop=data.crop,
    )


class _Images:
    """The images of a loader's batches, to be iterated repeatedly."""

    def __init__(self, loader: EvalLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in self._loader:
            yield batch["image"]
