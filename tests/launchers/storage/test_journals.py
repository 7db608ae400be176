"""What workers of other machines log reaches the driver, each entry once, whoever dies."""

import time
from pathlib import Path

import pytest

from launchers.storage.journals import JournalMirror
from launchers.storage.working_copy import WorkingCopy
from sbf_dist import tracking
from sbf_dist.object_storage import ObjectFolder
from sbf_dist.tracking import journal

KEY = "teachers"


@pytest.fixture
def machines(s3, tmp_path: Path) -> list[WorkingCopy]:
    """The driver's copy of a run, and those of two other machines."""
    names = ("driver", "one", "two")
    return [WorkingCopy(tmp_path / n, ObjectFolder.at(f"{s3.bucket}/runs/x")) for n in names]


def series(copy: WorkingCopy) -> tracking.Series:
    return tracking.attach(str(copy.root / "tracking" / KEY))


def steps(copy: WorkingCopy) -> list[int]:
    return [
        entry["step"]
        for file in journal.files(copy.root / "tracking" / KEY)
        for entry, _ in journal.read(file)
    ]


def test_the_driver_has_what_others_log_and_both_ways_go_on_while_files_grow(machines) -> None:
    driver, one, _ = machines
    driver.take_over()
    mine, theirs = series(driver), series(one)
    remote = JournalMirror(one, (f"tracking/{KEY}",), fetches=False)
    local = JournalMirror(driver, fetches=True)
    for step in (1, 2, 3):
        theirs.log_metrics({"loss": 0.5}, step)
        mine.log_metrics({"seconds": 1.0}, 10 * step)
        remote._mirror()
        local._mirror()
        assert sorted(steps(driver)) == [*range(1, step + 1), *range(10, 10 * step + 1, 10)]
    assert steps(one) == [1, 2, 3]  # workers need not know what the driver says


def test_nothing_is_delivered_that_the_store_has_not(machines) -> None:
    driver, *_ = machines
    driver.take_over()
    mine = series(driver)
    mine.log_metrics({"loss": 0.5}, 1)
    (file,) = journal.files(driver.root / "tracking" / KEY)
    mirror = JournalMirror(driver, fetches=True)
    assert mirror.kept(file) == 0
    mirror._mirror()
    first = file.stat().st_size
    assert mirror.kept(file) == first
    mine.log_metrics({"loss": 0.4}, 2)
    assert mirror.kept(file) == first
    mirror._mirror()
    assert mirror.kept(file) == file.stat().st_size > first


def test_after_a_machine_is_lost_no_point_is_missing_or_twice(machines) -> None:
    """A checkpoint of step 10 counts; the machine logs up to step 13, and is gone."""
    driver, one, two = machines
    driver.take_over()
    lost = series(one)
    for step in range(1, 11):
        lost.log_metrics({"loss": 0.5}, step)
    one.publish(f"tracking/{KEY}")  # before the checkpoint counts
    for step in range(11, 14):
        lost.log_metrics({"loss": 0.5}, step)

    two.fetch(f"tracking/{KEY}", discard=True)
    after = series(two)
    for step in range(11, 16):
        after.log_metrics({"loss": 0.5}, step)
    two.publish(f"tracking/{KEY}")
    # The lost machine comes back, with what it never published.
    one.fetch(f"tracking/{KEY}", discard=True)
    one.publish(f"tracking/{KEY}")
    driver.fetch()
    assert sorted(steps(driver)) == list(range(1, 16))


def test_a_store_that_is_away_is_one_warning_and_all_arrives_later(
    faulty_s3, machines, caplog
) -> None:
    driver, *_ = machines
    driver.take_over()
    mine = series(driver)
    mine.log_metrics({"loss": 0.5}, 1)
    mirror = JournalMirror(driver, fetches=True)
    faulty_s3.add("runs/x", "refuse")
    for _ in range(3):
        mirror._mirror()
    assert len([line for line in caplog.messages if "are not published" in line]) == 1
    faulty_s3.clear()
    mirror._mirror()
    assert [k for k in driver.store.objects() if k.startswith("tracking/")]


def test_the_end_of_a_run_does_not_wait_for_the_next_round(machines) -> None:
    driver, *_ = machines
    driver.take_over()
    with JournalMirror(driver, fetches=True) as mirror:
        series(driver).log_metrics({"loss": 0.5}, 1)
        (file,) = journal.files(driver.root / "tracking" / KEY)
        mirror.hurry()
        end = time.monotonic() + 120
        while not mirror.kept(file) and time.monotonic() < end:
            time.sleep(0.05)
        assert mirror.kept(file)
    assert mirror.kept(file) == file.stat().st_size
