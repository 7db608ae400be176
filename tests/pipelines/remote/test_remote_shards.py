"""Batches out of an object store are those of a folder, and what can go wrong on the way."""

import gc
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from remote_batches import NUM_SHARDS, SELECTION, VIEW, evaluated, same, taken, training

from pipelines.index import DataIndex
from pipelines.loader import TrainLoader
from pipelines.reader import Reader
from pipelines.remote import fetching, remote_shards
from pipelines.remote.shard_cache import Outcome, ShardCache
from pipelines.remote.store_reads import StoreReads
from pipelines.sources.folder import index_folder
from sbf_dist.errors import UserError
from sbf_dist.object_storage import ObjectFolder
from sbf_dist.settings import Augmentation


def test_the_index_is_the_one_of_the_folder(index, shards, tmp_path):
    local = index_folder(shards, **SELECTION)
    assert index.digest == local.digest
    assert index.root == ObjectFolder.at("s3://test-bucket/sets/cifar10")
    index.save(tmp_path)
    loaded = DataIndex.load(tmp_path)
    assert (loaded.root, loaded.digest) == (index.root, index.digest)
    assert np.array_equal(loaded.contents.images, index.contents.images)
    assert loaded.contents.shard_digests == index.contents.shard_digests
    assert loaded.place(0).startswith("s3://test-bucket/sets/cifar10/train-00000")


@pytest.fixture(params=["shards first", "images first"])
def mode(request, monkeypatch):
    """Images that are too small to be read one by one, or not."""
    if request.param == "images first":
        monkeypatch.setattr(remote_shards, "REQUEST_BYTES", 0)


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("kind", ["cache", "small", None])
def test_batches_are_those_of_the_folder_bit_for_bit(index, shards, request, kind):
    local = index_folder(shards, **SELECTION)
    cache = None if kind is None else request.getfixturevalue(kind)
    # 50 samples in batches of 7: over the border of an epoch, and twice.
    assert same(taken(training(index, cache), 16), taken(training(local, None), 16))
    assert same(evaluated(index, cache), evaluated(local, None))


def test_a_resumed_epoch_goes_on_with_the_batches_of_the_folder(index, shards, cache, tmp_path):
    local = index_folder(shards, **SELECTION)
    whole = taken(training(local, None), 9)
    first = training(index, cache)
    assert same(taken(first, 4), whole[:4])
    for own in (cache, ShardCache(tmp_path / "of another machine"), None):
        resumed = training(index, own)
        resumed.load_state_dict(first.state_dict())
        assert same(taken(resumed, 5), whole[4:])


def test_pixels_in_memory_come_from_the_store_as_well(index, shards, cache):
    local = index_folder(shards, **SELECTION)
    one = taken(training(index, cache, pixels="memory"), 5)
    assert same(one, taken(training(local, None, pixels="memory"), 5))


def test_unlabelled_images_may_lie_beside_the_set_in_the_bucket(s3, shards, tmp_path):
    places = {}
    for name in ("one", "two"):
        shutil.copytree(shards, tmp_path / name)
        for path in shards.iterdir():
            ObjectFolder.at(f"{s3.bucket}/sets/{name}").put(path, path.name)
    places["store"] = index_folder(
        f"{s3.bucket}/sets/one", **SELECTION, unlabelled=f"{s3.bucket}/sets/two"
    )
    places["disk"] = index_folder(tmp_path / "one", **SELECTION, unlabelled=tmp_path / "two")
    assert places["store"].digest == places["disk"].digest
    loaders = [
        training(places["store"], ShardCache(tmp_path / "cache"), parts=["unlabelled"]),
        training(places["disk"], None, parts=["unlabelled"]),
    ]
    assert same(*(taken(loader, 6) for loader in loaders))
    # The same content under two names takes its place once.
    assert len(list((tmp_path / "cache" / "objects").glob("*"))) == NUM_SHARDS - 1
    for other in (tmp_path / "two", "s3://other-bucket/sets/two"):
        with pytest.raises(UserError, match=r"data.unlabelled .*: must lie where data.root does"):
            index_folder(f"{s3.bucket}/sets/one", **SELECTION, unlabelled=other)


@pytest.mark.usefixtures("only_whole")
def test_every_shard_is_asked_for_once_and_the_second_epoch_asks_for_nothing(
    address, link, tmp_path
):
    index = index_folder(address, **SELECTION)
    cache = ShardCache(tmp_path / "cache")
    loader = training(index, cache)
    taken(loader, 16)
    for number in range(NUM_SHARDS - 1):
        assert link.asked("GET", f"train-{number:06}.tar") == 1
    assert link.asked("GET", "val-000000.tar") == 0  # nobody has asked for it yet
    evaluated(index, cache)
    assert link.asked("GET", "val-000000.tar") == 1
    before = len(link.requests)
    taken(loader, 8)
    taken(training(index, cache), 8)
    evaluated(index, cache)
    assert len(link.requests) == before


def ranks_of(index, cache):
    """Two loaders that share a machine; each has a fetcher of its own, as in two processes."""
    for rank in range(2):
        fetching._fetchers.clear()
        yield TrainLoader(
            index, ["labelled", "unlabelled"], Reader(rank, 2, shard_cache=cache), batch_size=5,
            view=VIEW, augmentation=Augmentation(), seed=3,
        )  # fmt: skip


def test_large_images_come_once_and_become_the_shards_of_all_processes(index, cache, monkeypatch):
    monkeypatch.setattr(remote_shards, "REQUEST_BYTES", 0)
    monkeypatch.setattr(remote_shards, "AHEAD_BATCHES", 2)  # all in one epoch
    asked: list[tuple[int, int]] = []  # shard and bytes
    begin_shards = threading.Event()
    read, wait = StoreReads.read, StoreReads.wait_until_idle

    def counted(self, shard, offset, count):
        asked.append((shard, count))
        return read(self, shard, offset, count)

    monkeypatch.setattr(StoreReads, "read", counted)
    monkeypatch.setattr(
        StoreReads, "wait_until_idle", lambda self: begin_shards.wait(240) and wait(self)
    )
    ranks = list(ranks_of(index, cache))
    for _ in range(5):  # an epoch
        for loader in ranks:
            next(loader)
    kept = index.contents.shard_digests[: NUM_SHARDS - 1]
    objects = cache.folder / "objects"
    assert {path.stem for path in objects.iterdir()} == set(kept)
    assert not any((objects / digest).exists() for digest in kept)
    begin_shards.set()
    end = time.monotonic() + 120
    while {path.name for path in objects.iterdir()} != set(kept):
        assert time.monotonic() < end
        time.sleep(0.05)
    whole = sum(index.contents.shard_bytes[: NUM_SHARDS - 1])
    assert sum(count for _, count in asked) <= 1.02 * whole
    asked.clear()
    for loader in ranks:
        taken(loader, 5)
    assert not asked


PROGRAM = """
import sys
from pathlib import Path
from pipelines.index import DataIndex
from pipelines.remote.fetching import fetcher_of
from pipelines.remote.shard_cache import ShardCache
index = DataIndex.load(Path(sys.argv[1]))
fetcher = fetcher_of(index, ShardCache(Path(sys.argv[2])))
print("ready", flush=True)
input()
fetcher.ask(range(len(index.shards)))
fetcher.wait(range(len(index.shards)), float(sys.argv[3]))
print(int(fetcher.here.sum()), flush=True)
"""


def started(tmp_path, seconds) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tmp_path / "index", tmp_path / "cache", str(seconds)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_processes_of_a_machine_fetch_each_shard_once(address, link, tmp_path):
    index_folder(address, **SELECTION).save(tmp_path / "index")
    processes = [started(tmp_path, 240) for _ in range(2)]
    link.rate = 400_000  # so slow that they meet
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate(timeout=240) == (f"{NUM_SHARDS}\n", "")
        assert process.returncode == 0
    for number in range(NUM_SHARDS - 1):
        assert link.asked("GET", f"train-{number:06}.tar") == 1


def test_a_program_that_ends_does_not_wait_for_all_that_it_asked_for(address, link, tmp_path):
    index_folder(address, **SELECTION).save(tmp_path / "index")
    process = started(tmp_path, 0.5)
    link.flows.clear()
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "0\n"
    link.flows.set()  # for the four shards that are on their way
    assert process.communicate(timeout=240) == ("", "")
    assert process.returncode == 0
    assert sum(link.asked("GET", f"train-{number:06}.tar") for number in range(5)) <= 4


def test_shards_without_room_are_read_image_by_image_and_nothing_is_thrown_out(
    address, link, small, caplog
):
    index = index_folder(address, **SELECTION)
    loader = training(index, small)
    taken(loader, 8)
    kept = sorted(path.name for path in (small.folder / "objects").iterdir())
    assert len(kept) == 2
    warnings = [r.getMessage() for r in caplog.records if "has no room" in r.getMessage()]
    assert len(warnings) == 1
    assert "images of the others are read from the store one by one, in every epoch" in warnings[0]
    asked = len(link.requests)
    taken(loader, 50)
    assert sorted(path.name for path in (small.folder / "objects").iterdir()) == kept
    # 7 epochs of 30 images that no shard here has, one request each; some were read ahead before.
    assert 180 <= len(link.requests) - asked <= 260


def test_loaders_that_are_gone_leave_their_room_to_others(index, small):
    loader = training(index, small)
    taken(loader, 4)
    other = os.urandom(40_000)
    ask = (hashlib.sha256(other).hexdigest(), len(other), lambda at, count: other[at : at + count])
    assert small.fetch(*ask) is Outcome.NO_ROOM
    loader.close()
    gc.collect()
    assert small.fetch(*ask) is Outcome.HERE
    # Those that stayed are as good as before.
    taken(training(index, small), 4)


def test_while_shards_come_images_are_read_with_a_share_of_what_comes(
    index, cache, shards, monkeypatch
):
    monkeypatch.setattr(remote_shards, "SINGLE_SHARE", 0.5)
    monkeypatch.setattr(remote_shards, "PATIENCE", 60.0)
    monkeypatch.setattr(fetching, "THREADS", 1)
    go_on = threading.Semaphore(2)  # shards that may come
    fetch = fetching.ShardFetcher._fetch
    monkeypatch.setattr(
        fetching.ShardFetcher, "_fetch", lambda self, shard: go_on.acquire() and fetch(self, shard)
    )
    loader = training(index, cache)
    local = training(index_folder(shards, **SELECTION), None)
    # Two of five shards have come: as much as one of them is may be read in single images.
    assert same(taken(loader, 1), taken(local, 1))
    fetcher = fetching.fetcher_of(index, cache)
    size = index.contents.shard_bytes[0]
    assert fetcher.fetched_bytes <= 2 * size * 1.05
    assert 0 < fetcher.read_bytes <= 0.5 * fetcher.fetched_bytes
    threading.Timer(0.3, go_on.release, (9,)).start()
    assert same(taken(loader, 9), taken(local, 9))
    assert fetcher.read_bytes <= 0.5 * fetcher.fetched_bytes


def test_few_images_are_read_by_themselves_and_kept(address, link):
    index = index_folder(address, **SELECTION)
    first = evaluated(index, None)
    asked = len(link.requests)
    assert same(evaluated(index, None), first)
    assert len(link.requests) == asked
    assert link.asked("GET", "val-000000.tar") == 10
