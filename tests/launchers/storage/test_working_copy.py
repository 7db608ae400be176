"""A run in a store and its copies on two machines: what counts, and in what order."""

import logging
from pathlib import Path

import pytest

from launchers.storage.working_copy import WorkingCopy
from sbf_dist import patience
from sbf_dist.errors import RunError, UserError
from sbf_dist.object_storage import ObjectFolder


@pytest.fixture
def machines(s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[WorkingCopy]:
    """Two machines' copies of one run."""
    return [WorkingCopy(tmp_path / name, ObjectFolder.at(f"{s3.bucket}/runs/x")) for name in "ab"]


def put(copy: WorkingCopy, **files: str) -> None:
    for name, text in files.items():
        path = copy.root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def files(copy: WorkingCopy) -> dict[str, str]:
    found = (path for path in copy.root.rglob("*") if path.is_file())
    return {
        path.relative_to(copy.root).as_posix(): path.read_text()
        for path in found
        if not path.name.startswith(".")
    }


def stored(copy: WorkingCopy) -> dict[str, str]:
    return {
        key: copy.store.read(key).decode()
        for key in copy.store.objects()
        if not key.startswith(".")
    }


def test_another_machine_gets_what_one_has_published(machines) -> None:
    one, two = machines
    one.take_over()
    put(one, weights__net="w", stages__compress="s")
    one.publish()
    two.take_over()
    assert files(two) == files(one) == {"weights/net": "w", "stages/compress": "s"}


def test_the_store_is_the_truth_for_a_copy_that_others_have_passed(machines, caplog) -> None:
    one, two = machines
    one.take_over()
    put(one, a="1", b="1", c="1")
    one.publish()
    two.take_over()
    put(two, a="of two", d="2")  # of the same size: only after the lock has settled
    (two.root / "b").unlink()
    two.publish()
    put(one, c="never published", e="never published")  # by a driver that was killed then
    with caplog.at_level(logging.WARNING):
        one.take_over()
    assert files(one) == stored(two) == {"a": "of two", "c": "1", "d": "2"}
    assert "another machine has continued the run: c" in caplog.text


def test_what_the_store_did_not_take_is_published_by_the_next_start_on_the_same_machine(
    machines, caplog
) -> None:
    one, _ = machines
    one.take_over()
    put(one, a="1", b="1")
    one.publish()
    put(one, a="2", c="2")
    (one.root / "b").unlink()
    one.take_over()
    assert stored(one) == files(one) == {"a": "2", "c": "2"}
    assert not caplog.messages


def test_nothing_goes_over_the_network_twice(machines, monkeypatch) -> None:
    one, two = machines
    one.take_over()
    put(one, a="1", b="1")
    one.publish()
    two.take_over()

    def forbidden(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(ObjectFolder, "fetch", forbidden)
    monkeypatch.setattr(ObjectFolder, "put", forbidden)
    for copy in machines:
        copy.publish()
        copy.fetch()
        copy.fetch(discard=True)
        copy.take_over()


def test_a_changed_file_of_the_same_size_is_seen(machines) -> None:
    one, two = machines
    one.take_over()
    put(one, a="1")
    one.publish()
    put(one, a="2")
    one.publish()
    two.fetch()
    assert files(two) == {"a": "2"}


def test_a_copy_that_is_damaged_or_has_lost_its_record_is_made_equal(machines) -> None:
    one, _ = machines
    one.take_over()
    put(one, a="1", b="1")
    one.publish()
    for harm in (
        lambda: (one.root / ".stored.json").write_text('{"files": 3}'),
        (one.root / ".stored.json").unlink,
    ):
        (one.root / "a").write_text("rubbish")
        put(one, more="rubbish")
        harm()
        one.take_over()
        assert files(one) == {"a": "1", "b": "1"}


def test_a_worker_keeps_nothing_of_its_own_but_the_drivers_machine_does(machines) -> None:
    one, two = machines
    put(one, a="1")
    one.publish()
    put(two, a="of an attempt that was cut", logs__x="not its business")
    two.fetch("a", discard=True)
    assert files(two) == {"a": "1", "logs/x": "not its business"}
    put(one, b="not yet published")
    one.fetch()
    assert files(one) == {"a": "1", "b": "not yet published"}


@pytest.mark.parametrize(
    "names",
    [
        ["weights__net", "trainings__net.json", "stages__teachers.json", "recipe.json"],
        ["data__samples-1.parquet", "data__index.json", "stages__prepare.json"],
        ["pseudo-labels__origin.json", "pseudo-labels__chunk-0", "pseudo-labels__manifest.json"],
        ["plans__round-1.json", "weights__sbf-round-1-fitted.safetensors"],
        ["tracking__run__1.jsonl", "tracking.json", "stages__teachers.json"],
    ],
)
def test_what_makes_others_count_is_published_last_and_removed_first(
    faulty_s3, s3, tmp_path: Path, names: list[str]
) -> None:
    keys = [name.replace("__", "/") for name in names]
    for number, key in enumerate(keys):
        copy = WorkingCopy(tmp_path / str(number), ObjectFolder.at(f"{s3.bucket}/runs/{number}"))
        put(copy, **dict.fromkeys(names, "1"))
        faulty_s3.add(f"P.*/runs/{number}/{key}", "refuse")
        with pytest.raises(UserError, match="access is denied"):
            copy.publish()
        assert set(stored(copy)) <= set(keys[:number])
        faulty_s3.clear()
        copy.publish()
        for name in keys:
            (copy.root / name).unlink()
        faulty_s3.add(f"DELETE.*/runs/{number}/{key}", "refuse")
        with pytest.raises(UserError, match="access is denied"):
            copy.publish()
        # Those of an old index go when another is there.
        assert set(stored(copy)) <= {*keys[: number + 1], "data/samples-1.parquet"}


def test_an_old_index_is_removed_once_the_new_one_is_there(machines) -> None:
    one, _ = machines
    put(one, **{"data__samples-1.parquet": "1", "data__index.json": "1"})
    one.publish()
    put(one, **{"data__samples-2.parquet": "2", "data__index.json": "2"})
    (one.root / "data/samples-1.parquet").unlink()
    one.publish()
    assert stored(one) == {"data/samples-2.parquet": "2", "data/index.json": "2"}


def test_connections_that_are_lost_are_tried_again_with_one_line(
    faulty_s3, machines, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(patience, "_FIRST_PAUSE_SECONDS", 0.1)
    one, two = machines
    one.take_over()
    put(one, a="1" * 1000, b="2")
    faulty_s3.add("P.*/runs/x/a", "drop", 6)  # the client itself tries five times
    with caplog.at_level(logging.WARNING):
        one.publish()
    assert [m.partition(":")[0] for m in caplog.messages] == ["s3", "the store answers again"]
    assert "retrying for 120 s" in caplog.messages[0]
    faulty_s3.add("GET.*/runs/x/a", "drop", 2)
    two.take_over()
    assert files(two) == files(one)


def test_a_store_that_stays_away_is_one_line_and_nothing_is_lost(
    faulty_s3, machines, monkeypatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.1)
    one, _ = machines
    one.take_over()
    put(one, a="1")
    faulty_s3.add("runs/x", "drop")
    with pytest.raises(
        RunError, match=r"gave up after 0.1 s; run the same command again"
    ) as caught:
        one.publish()
    assert "\n" not in str(caught.value)
    faulty_s3.clear()
    one.take_over()
    assert stored(one) == {"a": "1"}


def test_removing_takes_files_and_folders_in_the_store_before_those_of_the_copy(
    faulty_s3, machines
) -> None:
    one, two = machines
    put(one, stages__a="1", labels__a="1", labels__b="1")
    one.publish()
    one.remove(one.root / "stages/a")
    one.remove(one.root / "stages/none")
    faulty_s3.add("POST.*delete|DELETE", "refuse")
    with pytest.raises(UserError, match="access is denied"):
        one.remove(one.root / "labels")
    faulty_s3.clear()
    assert set(files(one)) == {"labels/a", "labels/b"}
    one.remove(one.root / "labels")
    assert stored(one) == files(one) == {}
    two.fetch()
    assert files(two) == {}


def test_checkpoints_are_neither_copied_nor_touched_and_go_with_their_manifest_first(
    faulty_s3, machines
) -> None:
    one, _ = machines
    checkpoints = one.root / "checkpoints/teachers"
    for name in ("x-1.a/manifest.json", "x-1.a/deepspeed/shard"):
        one.store.write(f"checkpoints/teachers/{name}", b"1")
    one.take_over()
    assert files(one) == {}
    assert one.has(checkpoints)
    faulty_s3.add("POST.*delete", "refuse")
    with pytest.raises(UserError):
        one.remove(checkpoints)
    assert set(stored(one)) == {"checkpoints/teachers/x-1.a/deepspeed/shard"}
    faulty_s3.clear()
    one.remove(checkpoints)
    assert not one.has(checkpoints)


def test_files_in_the_making_stay_here(machines) -> None:
    one, _ = machines
    put(one, weights__a="1")
    (one.root / "weights/.a.17.partial").write_text("half")
    one.publish()
    assert stored(one) == {"weights/a": "1"}


def test_objects_whose_names_lead_elsewhere_are_not_fetched(machines, s3, tmp_path: Path) -> None:
    one, _ = machines
    for key in ("../outside", "a/../../outside", "/outside", ".hidden", "weights/right"):
        s3.client().put_object(Bucket="test-bucket", Key=f"runs/x/{key}", Body=b"1")
    one.take_over()
    assert files(one) == {"weights/right": "1"}
    assert not list(tmp_path.rglob("outside"))


def test_who_may_not_write_writes_nothing(machines) -> None:
    def guard() -> None:
        raise UserError("another has it")

    one, _ = machines
    put(one, a="1")
    guarded = WorkingCopy(one.root, one.store, guard)
    for use in (guarded.publish, lambda: guarded.remove(one.root / "a"), guarded.take_over):
        with pytest.raises(UserError, match="another has it"):
            use()
    assert one.store.objects() == {}


def test_a_cache_that_cannot_be_written_is_one_line(s3, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    copy = WorkingCopy(tmp_path / "file" / "x", ObjectFolder.at(f"{s3.bucket}/runs/x"))
    with pytest.raises(UserError, match=r"cannot be written .*set SBF_DIST_CACHE"):
        copy.take_over()
