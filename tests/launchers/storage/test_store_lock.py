"""Two drivers and one run in a store: never both at work, and none locked out for ever."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from launchers.storage import driver, lock
from launchers.storage.lock import HEARTBEAT_SECONDS, STALE_AFTER_SECONDS, StoreLock
from launchers.storage.working_copy import WorkingCopy
from sbf_dist.errors import UserError
from sbf_dist.object_storage import ObjectFolder

PROGRAM = """
import sys, time
from launchers.storage import lock
from sbf_dist.patience import patiently
from sbf_dist.errors import UserError
from sbf_dist.object_storage import ObjectFolder
lock.SETTLING_SECONDS = 0.5
address, copy, begin = sys.argv[1:]
one = lock.StoreLock(ObjectFolder.at(address), "s3://b/x", copy)
ObjectFolder.at(address).objects()  # which opens the connection
while time.time() < float(begin):
    pass
try:
    patiently(one.take)
    print("taken", flush=True)
except UserError as error:
    print(error, flush=True)
"""


@pytest.fixture
def folder(s3, monkeypatch: pytest.MonkeyPatch) -> ObjectFolder:
    monkeypatch.setattr(lock, "SETTLING_SECONDS", 0)
    return ObjectFolder.at(f"{s3.bucket}/runs/x/.lock")


@pytest.fixture
def later(folder: ObjectFolder, s3) -> Callable[[float], None]:
    """Let time pass for the store: everything in it is so many seconds older."""
    from moto.s3.models import s3_backends

    def pass_by(seconds: float) -> None:
        for backends in s3_backends.values():
            for backend in backends.values():
                for bucket in backend.buckets.values():
                    for key in bucket.keys.values():
                        key.last_modified = key.last_modified.__class__.fromtimestamp(
                            key.last_modified.timestamp() - seconds, key.last_modified.tzinfo
                        )

    return pass_by


def lock_of(folder: ObjectFolder, copy: str) -> StoreLock:
    return StoreLock(folder, "s3://b/runs/x", copy)


def renew(one: StoreLock) -> None:
    """Beat once, as the thread does."""
    one._renew()


def test_the_second_is_refused_with_host_and_age_until_the_first_has_ended(folder) -> None:
    first = lock_of(folder, "one")
    first.take()
    with first, pytest.raises(UserError) as caught:
        lock_of(folder, "two").take()
    said = str(caught.value)
    assert "run s3://b/runs/x is in use by another sbf run, on " in said
    assert os.uname().nodename in said
    assert re.search(r"last heartbeat \d+ s ago", said)
    assert "\n" not in said
    assert folder.objects() == {}  # neither has left anything
    lock_of(folder, "two").take()


def test_of_two_processes_that_start_at_once_at_most_one_takes_it(folder) -> None:
    taken = []
    for _ in range(3):
        begin = time.time() + 3
        arguments = [[folder.address, name, str(begin)] for name in ("one", "two")]
        started = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *each], stdout=subprocess.PIPE, text=True
            )
            for each in arguments
        ]
        said = [process.communicate(timeout=240)[0] for process in started]
        taken.append(said.count("taken\n"))
        assert all(s == "taken\n" or "is in use by another sbf run" in s for s in said), said
        assert len(folder.objects()) == taken[-1]
        for key in folder.objects():
            folder.remove(key)
    assert max(taken) <= 1


@pytest.mark.parametrize(("seconds", "free"), [(STALE_AFTER_SECONDS / 2, False), (100, True)])
def test_a_killed_driver_locks_for_a_while_by_the_clock_of_the_store(
    folder, later, seconds: float, free: bool, monkeypatch
) -> None:
    lock_of(folder, "killed").take()
    later(seconds)
    monkeypatch.setattr(time, "time", lambda: 17.0)  # this machine's clock is wrong
    other = lock_of(folder, "other")
    if free:
        other.take()
        assert len(folder.objects()) == 1  # that of the dead one is gone
    else:
        with pytest.raises(UserError) as caught:
            other.take()
        said = re.search(r"last heartbeat (\d+) s ago.* expires in (\d+) s", str(caught.value))
        assert said
        age, left = map(int, said.groups())
        assert age >= seconds
        assert age + left == pytest.approx(STALE_AFTER_SECONDS, abs=1)


def test_a_driver_that_is_alive_keeps_it_however_long_it_takes(folder, later) -> None:
    first = lock_of(folder, "one")
    first.take()
    for _ in range(4):
        later(STALE_AFTER_SECONDS / 2)
        renew(first)
        with pytest.raises(UserError, match="in use"):
            lock_of(folder, "two").take()
    first.check()


def test_the_thread_renews_it(folder, monkeypatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
    first = lock_of(folder, "one")
    first.take()
    writes = threading.Semaphore(0)

    def write(_: StoreLock) -> None:
        writes.release()

    monkeypatch.setattr(StoreLock, "_write", write)
    with first:
        assert all(writes.acquire(timeout=120) for _ in range(3))
    assert HEARTBEAT_SECONDS * 4 < STALE_AFTER_SECONDS


def test_the_same_machine_need_not_wait_for_its_own_dead_driver(folder) -> None:
    lock_of(folder, "one").take()  # and is killed; the file lock of the copy has shown that
    second = lock_of(folder, "one")
    second.take()
    assert len(folder.objects()) == 1


def test_a_driver_that_slept_while_another_took_over_finds_out_and_writes_no_more(
    folder, later, monkeypatch
) -> None:
    first = lock_of(folder, "one")
    first.take()
    later(STALE_AFTER_SECONDS + 1)
    second = lock_of(folder, "two")
    second.take()
    now = lock._now
    monkeypatch.setattr(lock, "_now", lambda: now() + STALE_AFTER_SECONDS)  # the clock went on
    with pytest.raises(UserError, match="another driver has taken over") as caught:
        first.check()
    assert "\n" not in str(caught.value)
    renew(second)
    second.check()


def test_who_renews_late_gives_way_to_whom_did_not_see_it(folder, later) -> None:
    """The other one has listed before the renewal, and removes afterwards."""
    first = lock_of(folder, "one")
    first.take()
    later(STALE_AFTER_SECONDS + 1)
    folder.write("other.json", json.dumps({"host": "elsewhere", "copy": "two"}).encode())
    renew(first)
    with pytest.raises(UserError, match="another driver has taken over"):
        first.check()
    assert set(folder.objects()) == {"other.json"}


def test_a_store_that_was_away_for_long_takes_nobodys_lock(
    faulty_s3, folder, later, monkeypatch
) -> None:
    first = lock_of(folder, "one")
    first.take()
    later(STALE_AFTER_SECONDS * 3)
    renew(first)
    first.check()


def test_a_driver_that_lost_its_lock_is_ended_by_a_line(folder, s3, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)
    copy = WorkingCopy(tmp_path, ObjectFolder.at(f"{s3.bucket}/runs/x"))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as interruption.py does
    try:
        refused = pytest.raises(UserError, match="another driver has taken over")
        with refused, driver.taken_over(copy):
            (key,) = folder.objects()
            for _ in range(300):  # until it is not just being renewed
                folder.remove(key)
                threading.Event().wait(0.1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert folder.objects() == {}


def test_the_lock_is_given_back_where_the_run_fails(folder, s3, tmp_path: Path) -> None:
    copy = WorkingCopy(tmp_path, ObjectFolder.at(f"{s3.bucket}/runs/x"))
    with pytest.raises(UserError, match="no luck"), driver.taken_over(copy) as (own, _):
        (own.root / "made").write_text("1")
        assert len(folder.objects()) == 1
        raise UserError("no luck")
    assert folder.objects() == {}
    assert copy.store.read("made") == b"1"


def test_nothing_secret_is_in_the_lock(folder, s3) -> None:
    lock_of(folder, "one").take()
    (key,) = folder.objects()
    about = SimpleNamespace(**json.loads(folder.read(key)))
    assert set(vars(about)) == {"host", "process", "copy"}
