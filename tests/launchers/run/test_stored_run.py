"""A run in an object store that is refused, cut off, killed and gone on with on another machine.

It must end with the bits of a run in a folder, from what the store has.
"""

import importlib.util
import json
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from moto.s3.models import s3_backends
from safetensors.torch import load

from launchers.storage.lock import STALE_AFTER_SECONDS
from launchers.storage.working_copy import WorkingCopy
from sbf_dist.files import cache_folder
from sbf_dist.object_storage import ObjectFolder
from sbf_dist.tracking import journal

spec = importlib.util.spec_from_file_location(
    "faults", Path(__file__).parents[3] / "benchmarks" / "faults.py"
)
assert spec is not None
faults = importlib.util.module_from_spec(spec)
sys.modules["faults"] = faults  # dataclasses look there
assert spec.loader is not None
spec.loader.exec_module(faults)

pytestmark = pytest.mark.slow
SECRET = "not-for-any-file"


class StoredRun(faults.Run):
    """A run whose folder of runs is at an address."""

    address: str
    until = faults.STAGE

    def command(self) -> list[str]:
        given = super().command()
        given[given.index("--runs") + 1] = self.address
        given[given.index("--until") + 1] = self.until
        return given

    @property
    def store(self) -> ObjectFolder:
        return ObjectFolder.at(f"{self.address}/{faults.NAME}")

    def saved(self) -> int:
        keys = self.store.objects(f"checkpoints/{faults.STAGE}")
        names = {key.split("/")[2] for key in keys if key.endswith("/manifest.json")}
        return max((int(name[-17:-9]) for name in names), default=0)


def let_time_pass(seconds: float) -> None:
    """Make all that the servers of this process have older."""
    for account in s3_backends.values():
        for backend in account.values():
            for bucket in backend.buckets.values():
                for key in bucket.keys.values():
                    stamp = key.last_modified.timestamp() - seconds
                    key.last_modified = key.last_modified.fromtimestamp(
                        stamp, key.last_modified.tzinfo
                    )


def wait_for_checkpoint_after(run: StoredRun, step: int) -> None:
    while run.saved() <= step:
        assert run.alive(), run.output
        time.sleep(0.1)


def delivered(database: Path) -> list[tuple[str, int]]:
    """Name and step of all metrics that a training has logged to MLflow."""
    with sqlite3.connect(database) as connection:
        return connection.execute(
            "select key, step from metrics where key like ? order by key, step",
            [f"{faults.TRAINING}/loss"],
        ).fetchall()


@pytest.fixture
def whole(tmp_path: Path):
    """A run in a folder, without a fault."""
    (tmp_path / "whole").mkdir()
    run = faults.Run(tmp_path / "whole", steps=60, workers=1, pause=0.0)
    run.start()
    assert run.finish() == 0, run.output
    return run


@pytest.fixture
def stored(s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoredRun]:
    """The same run in a store, not yet started."""
    monkeypatch.setenv("SBF_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    (tmp_path / "stored").mkdir()
    run = StoredRun(tmp_path / "stored", steps=60, workers=1, pause=0.0)
    run.pace.write_text("10 0.5")  # after a checkpoint the next one takes its time
    run.address = f"{s3.bucket}/runs"
    yield run
    run.end()


def test_it_goes_on_from_the_store_alone_and_ends_with_the_bits_of_a_run_in_a_folder(
    whole, faulty_s3, stored: StoredRun
) -> None:
    refused_at = refuse_a_checkpoint(stored, faulty_s3)
    killed_at = lose_connections_and_the_machine(stored, faulty_s3, after=refused_at)
    let_time_pass(-1000)  # however long the next start takes
    stored.start()
    assert stored.finish() == 2, stored.output
    assert "run s3://test-bucket/runs/digits is in use by another sbf run" in stored.output
    let_time_pass(1000 + STALE_AFTER_SECONDS + 1)
    stored.pace.unlink()
    stored.until = "pseudo-labels"
    stored.start()
    assert stored.finish() == 0, stored.output
    assert "Traceback" not in stored.output

    keys = stored.store.objects()
    weights = load(stored.store.read(f"weights/{faults.TRAINING}.safetensors"))
    assert faults.same_bits(whole.weights(), weights)
    result = json.loads(stored.store.read(f"trainings/{faults.TRAINING}.json"))
    assert result["from_step"] == killed_at
    expected = {f"stages/{name}.json" for name in ("prepare", "teachers", "pseudo-labels")}
    expected |= {"recipe.json", "pseudo-labels/manifest.json", "pseudo-labels/chunk-00000.parquet"}
    assert expected <= keys.keys()
    assert not [key for key in keys if ".lock/" in key or ".partial" in key]
    assert_every_point_stands_once(whole, stored)
    # Secrets of the environment are nowhere.
    assert SECRET not in stored.output
    for key in keys:
        assert SECRET.encode() not in stored.store.read(key), key


def refuse_a_checkpoint(run: StoredRun, faulty_s3) -> int:
    """Let the store refuse one after the first; the step of the last one that counts."""
    run.start()
    wait_for_checkpoint_after(run, 0)
    faulty_s3.add("P.*/checkpoints/.*/ranks/", "refuse")
    assert run.finish() == 2, run.output
    faulty_s3.clear()
    assert run.store.objects(".lock") == {}
    (line,) = [line for line in run.output.splitlines() if "checkpoint of step" in line]
    assert line.startswith("sbf: checkpoint of step ")
    assert f"{run.address}/digits/checkpoints/teachers: " in line
    assert "access is denied" in line
    saved = run.saved()
    assert f"(the one before, {faults.TRAINING}-{saved:08d}." in line
    return saved


def lose_connections_and_the_machine(run: StoredRun, faulty_s3, after: int) -> int:
    """Drop requests, which stops nothing; kill the driver, and remove all that the machine had.

    The step of the newest checkpoint.
    """
    faulty_s3.add("P.*/checkpoints/.*/deepspeed/", "drop", 7)
    run.start()
    wait_for_checkpoint_after(run, after)
    assert not faulty_s3.rules[0][2]
    faulty_s3.clear()
    orphans = run.below("worker")
    faults.kill(run, "driver")
    psutil.wait_procs(orphans, 120)
    assert "retrying for" in run.output
    # MLflow's database stays, as on a server.
    copies = WorkingCopy.of(run.address, faults.NAME).root.parent
    database = (copies / "mlflow.db").read_bytes()
    shutil.rmtree(cache_folder())
    copies.mkdir(parents=True)
    (copies / "mlflow.db").write_bytes(database)
    return run.saved()


def assert_every_point_stands_once(whole, stored: StoredRun) -> None:
    """Although the journals of the first machine went with it."""
    copy = WorkingCopy.of(stored.address, faults.NAME)
    points = delivered(copy.root.parent / "mlflow.db")
    assert points == delivered(whole.runs / "mlflow.db")
    assert len(points) == len(set(points)) == 60 // 5
    logged = [
        entry["step"]
        for file in journal.files(copy.root / "tracking" / faults.STAGE)
        for entry, _ in journal.read(file)
        if f"{faults.TRAINING}/loss" in entry.get("metrics", {})
    ]
    assert logged == [step for _, step in points]
