import fcntl
import hashlib
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from pipelines.remote import shard_cache, unfinished
from pipelines.remote.shard_cache import OtherContentError, Outcome, ShardCache
from pipelines.remote.unfinished import BLOCK_BYTES
from sbf_dist.errors import UserError

KB = 10**3
SHARDS = [bytes([number]) * 40 * KB for number in range(4)]
DIGESTS = [hashlib.sha256(data).hexdigest() for data in SHARDS]


@pytest.fixture
def cache(tmp_path):
    """Room for two of the shards."""
    found = ShardCache(tmp_path / "cache", gigabytes=1e-4)
    found.check(40 * KB)
    return found


def fetch(cache, number, data=None):
    data = SHARDS[number] if data is None else data
    return cache.fetch(DIGESTS[number], 40 * KB, lambda at, count: data[at : at + count])


def read(cache, number):
    handle = cache.open(DIGESTS[number], 40 * KB)
    if handle is None:
        return None
    try:
        return os.pread(handle, 40 * KB, 0)
    finally:
        os.close(handle)


def test_what_was_fetched_is_kept_and_not_asked_for_again(cache):
    assert read(cache, 0) is None
    assert fetch(cache, 0) is Outcome.HERE
    assert read(cache, 0) == SHARDS[0]
    assert fetch(cache, 0, data=b"not read") is Outcome.HERE


def test_a_shard_comes_in_parts(cache, monkeypatch):
    monkeypatch.setattr(shard_cache, "CHUNK_BYTES", 7 * KB)
    assert fetch(cache, 0) is Outcome.HERE
    assert read(cache, 0) == SHARDS[0]


def test_what_has_another_digest_is_not_kept(cache):
    with pytest.raises(OtherContentError):
        fetch(cache, 0, data=SHARDS[1])
    assert read(cache, 0) is None
    assert not list((cache.folder / "objects").iterdir())


def test_a_fetch_that_is_broken_off_goes_on_with_what_is_missing(cache, monkeypatch):
    monkeypatch.setattr(shard_cache, "CHUNK_BYTES", 20 * BLOCK_BYTES)
    asked = []

    def breaks(at, count):
        asked.append((at, count))
        if len(asked) == 3:
            raise ConnectionError("gone")
        return SHARDS[0][at : at + count]

    with pytest.raises(ConnectionError):
        cache.fetch(DIGESTS[0], 40 * KB, breaks)
    assert read(cache, 0) is None
    assert cache.fetch(DIGESTS[0], 40 * KB, breaks) is Outcome.HERE
    assert [at // BLOCK_BYTES for at, _ in asked] == [0, 20, 40, 40, 60]
    assert read(cache, 0) == SHARDS[0]
    assert {path.name for path in (cache.folder / "objects").iterdir()} == {DIGESTS[0]}


def test_parts_that_were_kept_are_not_fetched_again(cache):
    whole = bytes(range(200)) * 200
    digest = hashlib.sha256(whole).hexdigest()
    assert cache.read(digest, len(whole), 700, 100) is None
    assert cache.begin(digest, len(whole)) is Outcome.BEGUN
    cache.keep(digest, len(whole), 0, whole[:1024])
    cache.keep(digest, len(whole), 20 * KB, whole[20 * KB :])  # begins within a block
    assert cache.read(digest, len(whole), 700, 100) == whole[700:800]
    assert cache.read(digest, len(whole), 1000, 100) is None
    asked = []

    def rest(at, count):
        asked.append((at, count))
        return whole[at : at + count]

    assert cache.fetch(digest, len(whole), rest) is Outcome.HERE
    assert asked == [(1024, 40 * BLOCK_BYTES - 1024)]
    assert cache.read(digest, len(whole), 1000, 100) == whole[1000:1100]
    cache.keep(digest, len(whole), 0, b"late" * 128)  # of a process that was slower
    assert cache.read(digest, len(whole), 0, 512) == whole[:512]


def test_parts_that_a_loss_of_power_has_taken_are_found_by_the_digest_of_the_whole(cache):
    assert cache.begin(DIGESTS[1], 40 * KB) is Outcome.BEGUN
    cache.keep(DIGESTS[1], 40 * KB, 0, bytes(1024))  # marked, but not what was written
    with pytest.raises(OtherContentError):
        fetch(cache, 1)
    assert not list((cache.folder / "objects").iterdir())
    assert fetch(cache, 1) is Outcome.HERE
    assert read(cache, 1) == SHARDS[1]


def test_a_file_that_a_loss_of_power_has_cut_is_fetched_again(cache):
    fetch(cache, 0)
    os.truncate(cache.folder / "objects" / DIGESTS[0], 7)
    assert read(cache, 0) is None
    assert fetch(cache, 0) is Outcome.HERE
    assert read(cache, 0) == SHARDS[0]


def test_the_least_recently_used_shard_makes_room(cache):
    fetch(cache, 0)
    fetch(cache, 1)
    os.utime(cache.folder / "objects" / DIGESTS[0], (1, 1))
    os.utime(cache.folder / "objects" / DIGESTS[1], (2, 2))
    assert read(cache, 0) == SHARDS[0]  # now it is the other that was used long ago
    assert fetch(cache, 2) is Outcome.HERE
    assert [read(cache, number) is not None for number in range(3)] == [True, False, True]


def test_a_shard_that_is_open_stays_readable_when_it_is_removed(cache):
    fetch(cache, 0)
    handle = cache.open(DIGESTS[0], 40 * KB)
    fetch(cache, 1)
    os.utime(cache.folder / "objects" / DIGESTS[0], (1, 1))
    fetch(cache, 2)
    assert read(cache, 0) is None
    assert os.pread(handle, 40 * KB, 0) == SHARDS[0]
    os.close(handle)


def test_what_is_in_use_is_not_removed_and_nothing_is_removed_in_vain(cache):
    fetch(cache, 0)
    fetch(cache, 1)
    with cache.using(DIGESTS[:2]):
        assert fetch(cache, 2) is Outcome.NO_ROOM
        assert read(cache, 0) and read(cache, 1)
    with cache.using(DIGESTS[1:2]):
        assert fetch(cache, 2) is Outcome.HERE
        assert read(cache, 0) is None
    assert len(list((cache.folder / "objects").iterdir())) == 2


def test_what_a_process_that_died_was_using_or_fetching_is_free(cache):
    fetch(cache, 0)
    program = f"""
import os
from pathlib import Path
from pipelines.remote.shard_cache import ShardCache
cache = ShardCache(Path({str(cache.folder)!r}), 1e-4)
using = cache.using([{DIGESTS[0]!r}])
using.__enter__()
cache.fetch({DIGESTS[1]!r}, 40000, lambda at, count: os._exit(9))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert (cache.folder / "objects" / f"{DIGESTS[1]}.partial").stat().st_size == 40 * KB
    assert list((cache.folder / "users").iterdir())
    os.utime(cache.folder / "objects" / DIGESTS[0], (1, 1))
    assert fetch(cache, 2) is Outcome.HERE
    assert fetch(cache, 3) is Outcome.HERE
    assert not list((cache.folder / "users").iterdir())
    assert {path.name for path in (cache.folder / "objects").iterdir()} == set(DIGESTS[2:])


def test_one_shard_is_fetched_by_one_at_a_time(cache):
    begun, go_on = threading.Event(), threading.Event()

    def slow(at, count):
        begun.set()
        assert go_on.wait(240)
        return SHARDS[0][at : at + count]

    thread = threading.Thread(target=cache.fetch, args=(DIGESTS[0], 40 * KB, slow))
    thread.start()
    assert begun.wait(120)
    assert fetch(cache, 0) is Outcome.ELSEWHERE
    # What is on its way counts: of three shards of 40 kB, 100 kB hold two.
    assert fetch(cache, 1) is Outcome.HERE
    with cache.using(DIGESTS[:2]):
        assert fetch(cache, 2) is Outcome.NO_ROOM
    go_on.set()
    thread.join()
    assert fetch(cache, 0, data=b"not read") is Outcome.HERE


def test_without_a_size_a_part_of_the_disk_stays_free(tmp_path, monkeypatch):
    cache = ShardCache(tmp_path)
    usage = shard_cache.shutil.disk_usage(tmp_path)
    full = usage._replace(total=2000 * KB, free=130 * KB)  # 100 of them stay
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match=r"its disk has 3e-05 GB for shards, the largest has 4e-05"):
        cache.check(40 * KB)
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda _: full._replace(free=150 * KB))
    with cache.using(DIGESTS[:1]):
        assert fetch(cache, 0) is Outcome.HERE


@pytest.mark.parametrize("largest", [100 * KB + 1, 10**9])
def test_a_size_below_one_shard_is_one_line(cache, largest):
    with pytest.raises(UserError, match=r"data.cache_gb = 0.0001 is less than the largest shard"):
        cache.check(largest)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.cache_dir .*file/below: cannot be used \(Not a dir"):
        ShardCache(tmp_path / "file" / "below").check(1)


def test_a_full_disk_is_one_line(cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unfinished, "_write", full)
    with pytest.raises(UserError, match=r"data.cache_dir .*: the disk is full; free some space"):
        fetch(cache, 0)
    assert not list((cache.folder / "objects").iterdir())


def test_the_default_folder_is_the_machines_for_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("SBF_DIST_CACHE", str(tmp_path))
    assert ShardCache.at(None, None).folder == tmp_path / "shards"
    monkeypatch.delenv("SBF_DIST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert str(ShardCache.at(None, None).folder) == "/home/me/.cache/sbf-dist/shards"


def test_many_at_once_keep_within_the_size(tmp_path):
    cache = ShardCache(tmp_path, gigabytes=1e-4)
    cache.check(40 * KB)
    largest = 0
    stop = threading.Event()

    def look():
        nonlocal largest
        while True:
            last = stop.is_set()  # what is there at the end is looked at, too
            with (tmp_path / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                sizes = [path.stat().st_size for path in (tmp_path / "objects").iterdir()]
            largest = max(largest, sum(sizes))
            if last:
                return
            time.sleep(0.001)

    def work(first):
        for turn in range(12):
            fetch(cache, (first + turn) % 4)

    with ExitStack() as threads:
        watch = threading.Thread(target=look)
        watch.start()
        threads.callback(watch.join)
        threads.callback(stop.set)
        workers = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert 40 * KB <= largest <= 100 * KB
