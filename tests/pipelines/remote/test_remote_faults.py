"""What can go wrong on the way from an object store."""

import threading
import time

import pytest
from remote_batches import NUM_SHARDS, SELECTION, change, same, taken, training

from pipelines.remote import fetching, remote_shards
from pipelines.remote.shard_cache import ShardCache
from pipelines.sources.folder import index_folder
from sbf_dist import patience
from sbf_dist.errors import RunError, UserError
from sbf_dist.object_storage import ObjectFolder


def test_a_batch_does_not_wait_forever_for_its_shards(index, cache, shards, monkeypatch):
    monkeypatch.setattr(remote_shards, "PATIENCE", 0.1)
    go_on = threading.Event()
    fetch = fetching.ShardFetcher._fetch
    monkeypatch.setattr(
        fetching.ShardFetcher, "_fetch", lambda self, shard: go_on.wait(240) and fetch(self, shard)
    )
    loader = training(index, cache)
    local = training(index_folder(shards, **SELECTION), None)
    assert same(taken(loader, 3), taken(local, 3))
    assert not list((cache.folder / "objects").glob("*"))
    go_on.set()
    assert same(taken(loader, 6), taken(local, 6))


@pytest.mark.usefixtures("only_whole")
def test_a_changed_shard_is_named_after_a_second_try(address, link, cache, caplog):
    index = index_folder(address, **SELECTION)
    change(address, "train-000002.tar")
    link.requests.clear()
    with pytest.raises(UserError) as caught:
        taken(training(index, cache), 8)
    assert str(caught.value) == (
        f"shard {address}/train-000002.tar: has another content than when it was indexed; restore "
        "it (sbf data check shows what else has changed) or prepare the set again"
    )
    assert link.asked("GET", "train-000002.tar") == 2
    assert any("fetching it again" in record.getMessage() for record in caplog.records)
    digest = index.contents.shard_digests[2]
    assert not (cache.folder / "objects" / digest).exists()


def test_a_changed_image_is_found_without_a_cache_as_well(index, address):
    sample = int(index.parts["labelled"][0])
    name = index.shards[index.shard[sample]]
    change(address, name, at=int(index.offset[sample]) + 30)
    with pytest.raises(UserError, match=f"{name}: has another content than when it was indexed"):
        taken(training(index, None, parts=["labelled"]), 8)


def test_a_shard_that_is_gone_or_has_another_size_is_named(index, address, cache):
    ObjectFolder.at(address).remove("train-000001.tar")
    with pytest.raises(UserError, match=r"train-000001.tar: is missing; restore it"):
        taken(training(index, cache), 8)
    ObjectFolder.at(address).write("train-000001.tar", b"short")
    with pytest.raises(UserError, match=r"train-000001.tar: has another content than when it was"):
        taken(training(index, None), 8)


def test_a_lost_connection_is_waited_for(address, link, cache, shards, caplog, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 120)
    index = index_folder(address, **SELECTION)
    link.cut()
    loader = training(index, cache)

    def mend() -> None:
        while not caplog.messages:
            time.sleep(0.05)
        link.mend()

    threading.Thread(target=mend, daemon=True).start()
    local = index_folder(shards, **SELECTION)
    assert same(taken(loader, 8), taken(training(local, None), 8))
    lines = [line for line in caplog.messages if line.endswith("; retrying for 120 s")]
    assert lines
    assert all(line.startswith(f"{address}/train-00000") for line in lines)
    assert "the store answers again" in caplog.messages


@pytest.mark.parametrize("cached", [True, False])
def test_a_store_that_stays_away_is_one_line_that_names_the_shard(address, link, cache, cached):
    index = index_folder(address, **SELECTION)
    link.cut()
    with pytest.raises(RunError) as caught:
        taken(training(index, cache if cached else None), 1)
    line = str(caught.value)
    assert line.startswith(f"{address}/train-00000")
    assert line.endswith("; run the same command again once the store answers")
    assert "\n" not in line
    link.mend()
    assert len(taken(training(index, cache if cached else None), 2)) == 2


def test_a_cache_that_somebody_empties_is_filled_again(index, shards, cache):
    loader = training(index, cache)
    taken(loader, 8)
    loader.close()
    for path in (cache.folder / "objects").iterdir():
        path.unlink()
    local = training(index_folder(shards, **SELECTION), None)
    taken(local, 8)
    assert same(taken(loader, 8), taken(local, 8))
    assert len(list((cache.folder / "objects").iterdir())) == NUM_SHARDS - 1


def test_a_cache_smaller_than_one_shard_is_refused(index, tmp_path):
    largest = max(index.contents.shard_bytes)
    cache = ShardCache(tmp_path, gigabytes=0.9 * largest / 1e9)
    with pytest.raises(UserError, match=r"data.cache_gb = .* is less than the largest shard"):
        taken(training(index, cache), 1)
