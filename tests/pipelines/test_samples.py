"""Images in files, in shards and in memory are the same images."""

import dataclasses
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from grouped_settings import grouped
from pictures import smooth_picture

from pipelines import memory
from pipelines.index import DataIndex
from pipelines.loader import EvalLoader, TrainLoader
from pipelines.sources.folder import index_folder
from sbf_dist.errors import UserError
from sbf_dist.settings import Augmentation

COMMON = {
    "batch_size": 4,
    "image_size": 16,
    "mean": (0.0, 0.0, 0.0),
    "std": (1 / 255, 1 / 255, 1 / 255),
    "rank": 0,
    "world_size": 1,
    "threads": 1,
}


def sharded(index: DataIndex, folder: Path, shards: int) -> DataIndex:
    """The same index with its images in tar files below `folder`."""
    folder.mkdir(parents=True)
    shard = np.arange(len(index)) % shards
    offset = np.zeros(len(index), dtype=np.int64)
    names = [f"{number:03}.tar" for number in range(shards)]
    for number, name in enumerate(names):
        with tarfile.open(folder / name, "w") as tar:
            for sample in np.flatnonzero(shard == number):
                tar.add(index.root / index.files[sample], index.files[sample])
        with tarfile.open(folder / name) as tar:
            for sample in np.flatnonzero(shard == number):
                offset[sample] = tar.getmember(index.files[sample]).offset_data
    return dataclasses.replace(index, root=folder, shards=names, shard=shard, offset=offset)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> DataIndex:
    """Twelve pictures, each of its own size and kind of file."""
    root = tmp_path_factory.mktemp("pictures")
    for k in range(12):
        (root / str(k % 2)).mkdir(exist_ok=True)
        name = root / str(k % 2) / f"{k}.{'jpg' if k % 3 else 'png'}"
        smooth_picture(30 + 7 * k, 50 - k).save(name)
    return index_folder(root, labelled_per_class=None, validation=4, seed=0)


def training(index: DataIndex, **arguments) -> list[dict[str, torch.Tensor]]:
    loader = TrainLoader(
        index,
        ["labelled"],
        **grouped(**(COMMON | {"augmentation": Augmentation(), "seed": 1} | arguments)),
    )
    return [next(loader) for _ in range(6)]


def difference(one, other) -> float:
    assert all(torch.equal(a["id"], b["id"]) for a, b in zip(one, other, strict=True))
    return max(
        float((a["image"] - b["image"]).abs().max()) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_images_in_shards_are_those_of_the_files(pictures, tmp_path, shards, monkeypatch):
    monkeypatch.setattr("pipelines.samples._MAX_OPEN_SHARDS", 2)
    index = sharded(pictures, tmp_path / "shards", shards)
    assert difference(training(index), training(pictures)) == 0
    loaders = [EvalLoader(one, "validation", **grouped(**COMMON)) for one in (index, pictures)]
    assert difference(*map(list, loaders)) == 0


def test_shards_and_files_may_stand_beside_each_other(pictures, tmp_path):
    index = sharded(pictures, tmp_path / "shards", 1)
    for sample in range(0, len(index), 2):
        (index.root / index.files[sample]).parent.mkdir(exist_ok=True)
        shutil.copy(pictures.root / index.files[sample], index.root / index.files[sample])
        index.shard[sample], index.offset[sample] = -1, 0
    assert difference(training(index), training(pictures)) == 0
    shutil.rmtree(index.root / "0")
    with pytest.raises(UserError, match=r"shards/0/\d+\.\w+: was removed after it was indexed"):
        training(index)


def test_an_index_of_shards_comes_back_as_it_was_saved(pictures, tmp_path):
    index = sharded(pictures, tmp_path / "shards", 2)
    index.save(tmp_path / "index")
    loaded = DataIndex.load(tmp_path / "index")
    assert loaded.shards == index.shards
    assert np.array_equal(loaded.shard, index.shard)
    assert np.array_equal(loaded.offset, index.offset)
    assert loaded.digest == index.digest != pictures.digest
    moved = dataclasses.replace(index, offset=index.offset + 1)
    assert moved.digest != index.digest


def test_what_is_wrong_with_a_shard_is_reported_with_the_name_of_the_image(pictures, tmp_path):
    index = sharded(pictures, tmp_path / "shards", 1)
    shard = tmp_path / "shards" / "000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5000])
    with pytest.raises(UserError, match=r"000\.tar:\d/\d+\.\w+: the shard ends before it"):
        training(index)
    shard.write_bytes(b"x" * len(whole))
    with pytest.raises(UserError, match=r"000\.tar:\d/\d+\.\w+: changed since it was indexed: not"):
        training(index)
    shard.unlink()
    with pytest.raises(UserError, match=r"000\.tar: cannot be opened \(No such file"):
        training(index)


@pytest.mark.parametrize("crop", ["resized", "padded"])
def test_images_in_memory_are_those_of_the_files(pictures, plain_index, tmp_path, crop):
    augmentation = Augmentation(crop=crop, rotate=10)
    index = sharded(pictures, tmp_path / "shards", 2)
    for one in (pictures, index):  # JPEG's colours at the edge of a crop are not quite the same
        cached = training(one, cache="memory", augmentation=augmentation)
        assert difference(cached, training(pictures, augmentation=augmentation)) < 6
    cached = training(plain_index, cache="memory", augmentation=augmentation)
    assert difference(cached, training(plain_index, augmentation=augmentation)) == 0


def test_images_in_memory_outlive_their_files(pictures, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pictures.root, copy)
    loader = TrainLoader(
        dataclasses.replace(pictures, root=copy),
        ["labelled"],
        **grouped(**COMMON, augmentation=Augmentation(), seed=1, cache="memory"),
    )
    state = loader.state_dict()
    first = [next(loader) for _ in range(3)]
    shutil.rmtree(copy)
    loader.load_state_dict(state)
    assert difference([next(loader) for _ in range(3)], first) == 0


def test_images_that_do_not_fit_into_memory_are_refused_with_numbers(pictures, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 50_000)
    with pytest.raises(UserError, match=r"cache memory: 8 decoded images .* use cache: none"):
        training(pictures, cache="memory")


def test_free_memory_is_that_of_this_machine():
    assert 1e7 < memory.free_memory() < 1e14


def test_an_image_of_another_size_than_indexed_is_named(pictures):
    index = dataclasses.replace(pictures, sizes=pictures.sizes + 1)
    with pytest.raises(UserError, match=r"image .*: is \d+ x \d+ pixels, was \d+ x \d+ when"):
        training(index, cache="memory")


def test_half_precision_is_the_rounded_single_precision(pictures):
    moments = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    half, single = training(pictures, dtype="float16", **moments), training(pictures, **moments)
    assert half[0]["image"].dtype == torch.float16
    assert half[0]["image"].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(half, single, strict=True):
        assert torch.allclose(a["image"].float(), b["image"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache": "disk"}, "cache 'disk': must be one of none, memory"),
        ({"dtype": "int8"}, "dtype 'int8': must be one of float32, float16"),
    ],
)
def test_unknown_ways_are_refused(pictures, arguments, message):
    with pytest.raises(UserError, match=message):
        training(pictures, **arguments)
