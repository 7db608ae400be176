"""A prepared set in shards, in a folder and in a bucket, and a link to the bucket."""

from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from archive_makers import cifar10_python
from remote_batches import SELECTION
from store_link import link_to

from pipelines.index import DataIndex
from pipelines.remote import remote_shards
from pipelines.remote.shard_cache import ShardCache
from pipelines.sources import units
from pipelines.sources.folder import index_folder
from pipelines.sources.preparation import prepare
from sbf_dist import object_storage, patience
from sbf_dist.object_storage import ObjectFolder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's 50 + 10 images in five shards and one."""
    folder = tmp_path_factory.mktemp("set")
    cifar10_python(folder / "archives")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "shuffled_runs", partial(units.shuffled_runs, most_samples=10))
        prepare(
            "cifar10", folder / "archives", folder / "shards", layout="webdataset", checksum=False
        )
    return folder / "shards"


@pytest.fixture
def address(s3, shards) -> str:
    """The same set in the bucket."""
    folder = ObjectFolder.at(f"{s3.bucket}/sets/cifar10")
    for path in shards.iterdir():
        folder.put(path, path.name)
    return folder.address


@pytest.fixture
def link(s3, monkeypatch):
    """A link to the store that can be slow and cut; nobody waits long between tries."""
    port = urlsplit(s3.environment["AWS_ENDPOINT_URL"]).port
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(patience, "_FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(object_storage, "_ATTEMPTS", 1)
    with link_to(port) as link:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{link.port}")
        yield link


@pytest.fixture
def index(address) -> DataIndex:
    return index_folder(address, **SELECTION)


@pytest.fixture
def cache(tmp_path) -> ShardCache:
    return ShardCache(tmp_path / "cache", gigabytes=1.0)


@pytest.fixture
def small(index, tmp_path) -> ShardCache:
    """Room for two of the shards."""
    largest = max(index.contents.shard_bytes)
    return ShardCache(tmp_path / "small", gigabytes=2.5 * largest / 1e9)


@pytest.fixture
def only_whole(monkeypatch):
    """Batches wait for their shards: no image is read by itself meanwhile."""
    monkeypatch.setattr(remote_shards, "SINGLE_SHARE", 0.0)
    monkeypatch.setattr(remote_shards, "PATIENCE", 240.0)
