"""Checkpoints in a store, by several ranks, that is cut, refuses and damages them; without Ray."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launchers.on_ray import saving as module
from launchers.on_ray.saving import Saving
from launchers.on_ray.stopping import Stopping
from launchers.on_ray.stored_checkpoints import StoredShelf, shelf_at
from sbf_dist import patience
from sbf_dist.errors import RunError, UserError
from sbf_dist.object_storage import ObjectFolder
from sbf_dist.train.manifest import read_manifest

DIGESTS = {"training": "student"}


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone; the engine's files are two small ones."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(module.checkpoint, "write_rank", write_rank)
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setenv("SBF_DIST_CACHE", str(tmp_path / "cache"))
    yield
    dist.destroy_process_group()


@pytest.fixture
def store(s3) -> ObjectFolder:
    return ObjectFolder.at(f"{s3.bucket}/runs/x/checkpoints/distill")


def write_rank(engine: Any, own: Path, *, loader_state: dict[str, Any]) -> None:
    (own / "ranks").mkdir(parents=True)
    (own / "ranks" / "00000.json").write_text(json.dumps(loader_state))
    (own / "shard.pt").write_bytes(bytes(engine))


def opened(
    store: ObjectFolder,
    asked: Callable[[], bool] = lambda: False,
    before: Callable[[], None] = lambda: None,
) -> Saving:
    stopping = Stopping(nullcontext(asked), 60, Path("/nowhere"))
    shelf = StoredShelf(store, "student", before=before, mlflow_run="1a")
    return Saving(shelf, stopping)


def save(saving: Saving, step: int, size: int = 100) -> None:
    saving.save(size, step=step, loader_state={"step": step}, digests=DIGESTS)


def write(store: ObjectFolder, *steps: int) -> None:
    with opened(store) as saving:
        for step in steps:
            save(saving, step)


def steps(store: ObjectFolder) -> list[int]:
    names = StoredShelf(store, "student").names()
    return sorted(int(name.partition(".")[0].rpartition("-")[2]) for name in names)


def resumed(store: ObjectFolder) -> tuple[int, dict[str, Any]] | None:
    """The step that is gone on from, and the loader's state in its files."""
    with opened(store) as saving:
        if saving.resume is None:
            return None
        state = json.loads((saving.resume / "ranks/00000.json").read_text())
        assert read_manifest(saving.resume).mlflow_run == "1a"
        return read_manifest(saving.resume).step, state


def only(store: ObjectFolder, step: int, file: str) -> str:
    """The key of a file of the checkpoint of a step."""
    (key,) = [k for k in store.objects() if f"-{step:08d}." in k and k.endswith(file)]
    return key


def test_an_address_means_a_store_and_a_path_a_folder(tmp_path: Path) -> None:
    assert isinstance(shelf_at("s3://bucket/x", "student"), StoredShelf)
    assert shelf_at(str(tmp_path), "student").folder == tmp_path


def test_nothing_is_gone_on_from_where_there_never_was_a_checkpoint(store) -> None:
    assert resumed(store) is None


def test_the_newest_is_gone_on_from_and_the_last_so_many_are_kept(store) -> None:
    write(store, 10, 20, 30)
    assert steps(store) == [20, 30]
    assert resumed(store) == (30, {"step": 30})
    assert len({key.partition("/")[0] for key in store.objects()}) == 2  # no leftovers


def test_a_training_goes_on_while_its_checkpoint_is_uploaded_and_the_next_one_waits(
    store, monkeypatch
) -> None:
    let_go, started = threading.Event(), threading.Event()
    put = ObjectFolder.put

    def slowly(self: ObjectFolder, path: Path, key: str) -> None:
        started.set()
        assert let_go.wait(240)
        put(self, path, key)

    monkeypatch.setattr(ObjectFolder, "put", slowly)
    with opened(store) as saving:
        save(saving, 10)
        assert started.wait(120)
        second = threading.Thread(target=save, args=[saving, 20])
        second.start()
        second.join(0.2)
        assert second.is_alive()
        assert steps(store) == []
        let_go.set()
        second.join()
    assert steps(store) == [10, 20]


def test_a_kill_at_any_request_leaves_the_one_before(faulty_s3, store) -> None:
    """Every request that writes is the last one, in turn."""
    write(store, 10)
    for allowed in range(100):
        faulty_s3.add("PUT|POST|DELETE", "pass", allowed)
        faulty_s3.add("PUT|POST|DELETE", "refuse")
        try:
            write(store, 20)
        except UserError:
            faulty_s3.clear()
            # It may count, if what was cut is the removal of old ones.
            found = resumed(store)
            assert found in ((10, {"step": 10}), (20, {"step": 20}))
            assert set(steps(store)) <= {10, 20}
            manifests = {k.partition("/")[0] for k in store.objects() if "manifest" in k}
            assert {k.partition("/")[0] for k in store.objects()} == manifests  # no leftovers
        else:
            break
    else:
        pytest.fail("a hundred requests, and still not all")
    assert allowed > 5


def test_two_attempts_never_share_a_file(store) -> None:
    """One was taken for dead, and goes on writing the step that the other writes, too."""
    with opened(store) as dead, opened(store) as alive:
        save(dead, 10, 50)
        save(alive, 10, 60)
        dead.wait()
        alive.wait()
        save(alive, 20)
    assert steps(store) == [10, 20]
    store.remove(only(store, 20, "manifest.json"))
    assert resumed(store) == (10, {"step": 10})


def test_a_refused_upload_ends_the_training_at_the_next_checkpoint_in_one_line(
    faulty_s3, store
) -> None:
    with pytest.raises(UserError) as caught, opened(store) as saving:
        save(saving, 10)
        saving.wait()
        faulty_s3.add("PUT|POST", "refuse")
        save(saving, 20)
        saving.wait()
    said = str(caught.value)
    assert said.startswith(f"checkpoint of step 20 in {store.address}: ")
    assert "access is denied" in said
    assert "(the one before, student-00000010." in said
    assert said.endswith(" is whole)")
    assert "\n" not in said
    faulty_s3.clear()
    assert resumed(store) == (10, {"step": 10})


def test_connections_that_are_lost_in_the_middle_stop_nothing(
    faulty_s3, store, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 60)
    monkeypatch.setattr(patience, "_FIRST_PAUSE_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING), opened(store) as saving:
        faulty_s3.add("PUT.*shard", "drop", 1)  # the client's own second try
        faulty_s3.add("P.*manifest", "drop", 5)  # ours
        save(saving, 10)
    assert steps(store) == [10]
    said = [record.getMessage() for record in caplog.records if record.name == patience.__name__]
    assert [line.partition(":")[0] for line in said] == ["s3", "the store answers again"]
    faulty_s3.add("GET.*shard", "drop", 1)
    assert resumed(store) == (10, {"step": 10})


def test_a_store_that_stays_away_names_the_cause_and_the_one_before(faulty_s3, store) -> None:
    away = pytest.raises(RunError, match=r"Empty reply.*gave up after 0.1 s.*00000010")
    with away, opened(store) as saving:
        save(saving, 10)
        saving.wait()
        faulty_s3.add("PUT|POST", "drop")
        save(saving, 20)


def lead_out(store: ObjectFolder, key: str) -> None:
    """Let a manifest name a file outside of the checkpoint."""
    manifest = key.replace("shard.pt", "manifest.json")
    store.write(manifest, store.read(manifest).replace(b'"shard.pt"', b'"../../../shard.pt"'))


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda s, key: s.write(key, bytes(99)), "shard.pt is damaged: 99 bytes instead of 100"),
        (lambda s, key: s.write(key, b"1" * 100), "shard.pt is damaged: its SHA-256 is not the"),
        (lambda s, key: s.remove(key), "shard.pt is missing"),
        (lambda s, key: s.write(key.replace("shard.pt", "manifest.json"), b"{"), "is damaged: "),
        (lead_out, "manifest.json lists '../../../shard.pt'"),
    ],
    ids=["truncated", "changed", "missing", "manifest", "leading out"],
)
def test_a_damaged_one_does_not_count_and_a_warning_names_it_and_the_one_before(
    store, caplog, harm, fault: str
) -> None:
    write(store, 10, 20)
    key = only(store, 20, "shard.pt")
    harm(store, key)
    with caplog.at_level(logging.WARNING):
        assert resumed(store) == (10, {"step": 10})
    (line,) = caplog.messages
    assert f"{store.address}/{key.partition('/')[0]}: " in line
    assert fault in line
    assert "training student resumes from student-00000010." in line
    caplog.clear()
    write(store, 20)
    assert resumed(store) == (20, {"step": 20})
    assert steps(store) == [10, 20]
    assert not caplog.messages


def test_where_none_is_whole_the_error_lists_them_and_leaves_them(store) -> None:
    write(store, 10, 20)
    for step in (10, 20):
        store.remove(only(store, step, "shard.pt"))
    with pytest.raises(UserError) as caught:
        resumed(store)
    assert "\n" not in str(caught.value)
    for step in (10, 20):
        assert f"student-{step:08d}." in str(caught.value)
    assert "shard.pt is missing" in str(caught.value)
    assert "--again STAGE" in str(caught.value)
    assert steps(store) == [10, 20]


def test_a_store_that_does_not_answer_damages_no_checkpoint(faulty_s3, store) -> None:
    write(store, 10, 20)
    faulty_s3.add("GET.*shard", "drop")
    with pytest.raises(RunError, match=r"gave up after 0.1 s"):
        resumed(store)
    faulty_s3.clear()
    assert resumed(store) == (20, {"step": 20})


def test_checkpoints_of_other_trainings_are_neither_taken_nor_removed(store) -> None:
    other = StoredShelf(store, "student-2")
    with Saving(other, Stopping(nullcontext(lambda: False), 60, Path("/nowhere"))) as saving:
        save(saving, 500)
    write(store, 10, 20, 30)
    assert resumed(store) == (30, {"step": 30})
    assert steps(store) == [20, 30, 500]


def test_what_is_logged_is_stored_before_a_checkpoint_counts(store) -> None:
    seen: list[list[int]] = []
    with opened(store, before=lambda: seen.append(steps(store))) as saving:
        save(saving, 10)
        save(saving, 20)
    assert seen == [[], [10]]


def test_a_node_fetches_a_checkpoint_once_and_keeps_no_other(store, monkeypatch) -> None:
    write(store, 10, 20)
    shelf = StoredShelf(store, "student")
    newest = shelf.newest_whole()
    assert newest is not None
    fetched: list[str] = []
    fetch = ObjectFolder.fetch

    def counted(self: ObjectFolder, key: str, path: Path) -> None:
        fetched.append(key)
        fetch(self, key, path)

    monkeypatch.setattr(ObjectFolder, "fetch", counted)
    ranks = [StoredShelf(store, "student") for _ in range(4)]
    assert {shelf.here(newest) for shelf in ranks} == {shelf.here(newest)}
    assert not fetched
    # A shard that was cut in the middle of being fetched, on this node, before.
    folder = shelf.here(newest)
    (folder / ".whole").unlink()
    (folder / "shard.pt").write_bytes(b"cut")
    shelf.here(newest)
    assert fetched == [f"{newest}/shard.pt"]
    assert (folder / "shard.pt").stat().st_size == 100
    write(store, 30)
    assert resumed(store) == (30, {"step": 30})
    folders = [path.name for path in shelf.folder.iterdir() if path.is_dir()]
    assert [name.partition(".")[0] for name in folders] == ["student-00000030"]


def test_the_best_is_kept_beside_the_newest_also_by_the_next_attempt(store) -> None:
    for top1s in ({10: 0.5, 20: 0.9, 30: 0.7}, {40: 0.8, 50: None}):
        stopping = Stopping(nullcontext(lambda: False), 60, Path("/nowhere"))
        with Saving(StoredShelf(store, "student", keep_best=True), stopping) as saving:
            for step, top1 in top1s.items():
                saving.save(9, step=step, loader_state={}, digests=DIGESTS, top1=top1)
    assert steps(store) == [20, 40, 50]
