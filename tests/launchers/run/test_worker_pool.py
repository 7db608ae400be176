"""Ray and the workers of a run: when they begin early, and that they are ended once."""

from pathlib import Path

import pytest

from launchers.on_ray import attempts, local_ray, worker_group
from launchers.run.first_imports import import_libraries
from launchers.run.folder import RunFolder
from launchers.run.worker_pool import WorkerPool
from sbf_dist.recipe import validate

CONTENT = {
    "name": "tiny",
    "data": {"source": "digits", "image_size": 16},
    "teachers": [{"name": "one", "model": "cifar_resnet8", "training": {"steps": 10}}],
    "compress": {"teacher": "one", "macs": 0.5},
    "distill": {"training": {"steps": 10}},
    "workers": {"count": [1, 3], "cpus": 1},
}


class Entered:
    """A context that says when it begins and ends."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def __enter__(self) -> "Entered":
        self.said.append(f"{self.name} begins")
        return self

    def __exit__(self, *_: object) -> None:
        self.said.append(f"{self.name} ends")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to Ray and workers, of which none are started."""
    said: list[str] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(local_ray, "local_ray", lambda *_, **__: Entered("Ray", said))
    monkeypatch.setattr(worker_group, "KeptWorkers", lambda _: Entered("pool", said))

    def begin(first, *, storage, kept, counts):
        said.append(f"{first.__name__} on {counts} in {storage.name}")

    monkeypatch.setattr(attempts, "begin_workers", begin)
    return said


def pool(folder: Path) -> WorkerPool:
    return WorkerPool(validate(CONTENT, (), "recipe"), RunFolder(folder, "tiny"))


def test_workers_of_this_machine_begin_early_and_are_ended_once(said, tmp_path: Path) -> None:
    with pool(tmp_path) as own:
        own.begin()
        own.kept()
        own.end()
    begun = ["Ray begins", "pool begins", f"{import_libraries.__name__} on [1, 2] in checkpoints"]
    assert said == [*begun, "pool ends", "Ray ends"]


def test_a_cluster_is_joined_when_its_workers_are_needed(
    said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pool(tmp_path) as own:
        own.begin()
        assert said == []
        own.kept()
    assert said == ["Ray begins", "pool begins", "pool ends", "Ray ends"]
