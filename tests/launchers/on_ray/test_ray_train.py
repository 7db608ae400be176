"""Real workers on a real Ray, which is started once."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_worker
from tiny_worker import CHECKPOINT_EVERY, STEPS
from waiting import eventually

from launchers.interruption import Interrupted, signals_raise
from launchers.machine import available_cpus
from launchers.on_ray import held_places, local_ray, worker_group
from launchers.on_ray.attempts import Progress, begin_workers, run_workers
from launchers.on_ray.worker_group import KeptWorkers
from sbf_dist.errors import RunError, UserError
from sbf_dist.recipe import Workers
from sbf_dist.train import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(available_cpus() < 2, reason="two workers need two CPUs"),
]
DIE_AT = 17
SEEN_AT = 25  # a record between two checkpoints, which the driver must not miss


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parents[2])]))
        with local_ray.local_ray(workers=2):
            yield


@pytest.fixture(scope="module")
def killed(ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training in which rank 1 dies by kill -9 at step 17; all that was seen of it."""
    folder = tmp_path_factory.mktemp("killed")
    progress: list[dict[str, Any]] = []
    listening: list[set[str]] = []

    def on_progress(record: dict[str, Any]) -> None:
        progress.append(record)
        listening.append(addresses())
        if record["step"] == SEEN_AT:
            (folder / "seen").touch()

    warnings = Messages()
    logging.getLogger("launchers.on_ray").addHandler(warnings)
    config = {
        "diary": str(folder),
        "at": {str(DIE_AT): signal.SIGKILL},
        "seen_at": SEEN_AT,
    }
    with KeptWorkers(Workers(count=2, max_lost=1)) as kept:
        result = run_workers(
            tiny_worker.train,
            config,
            name="tiny",
            storage=folder / "runs",
            logs=folder / "logs",
            kept=kept,
            progress=Progress(on_progress),
        )
    logging.getLogger("launchers.on_ray").removeHandler(warnings)
    return {
        "result": result,
        "progress": progress,
        "listening": listening,
        "warnings": warnings.messages,
        "folder": folder,
    }


def test_what_an_attempt_has_left_behind_is_given_back(ray: None) -> None:
    from ray.util import placement_group, placement_group_table

    left = placement_group([{"CPU": 2}])
    assert left.wait(120)
    asked = placement_group([{"CPU": 1}])
    held_places.give_back()
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}
    with held_places.asked_for({"CPU": 1}, 2):
        assert {g["state"] for g in placement_group_table().values()} > {"REMOVED"}
    assert asked.id != left.id
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def addresses() -> set[str]:
    """The addresses at which this process and what it started are listening."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    own = {f"pid={process.pid}," for process in processes}
    table = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
    lines = [line for line in table.splitlines() if any(pid in line for pid in own)]
    return {line.split()[3].rpartition(":")[0] for line in lines}


def checkpoints(killed: dict[str, Any]) -> list[Path]:
    return sorted((killed["folder"] / "runs/tiny").glob("tiny-*"))


def diary(killed: dict[str, Any], rank: int) -> list[tuple[int, int, list[int]]]:
    text = (killed["folder"] / f"{rank}.jsonl").read_text()
    return [tuple(json.loads(line)) for line in text.splitlines()]


def test_after_a_kill_all_go_on_from_the_last_checkpoint_to_the_last_step(
    killed: dict[str, Any],
) -> None:
    assert killed["result"]["start"] == CHECKPOINT_EVERY
    assert killed["progress"][-1]["step"] == STEPS
    assert checkpoint.verify(checkpoints(killed)[-1]).step == STEPS


def test_after_a_kill_no_sample_is_repeated_or_left_out(killed: dict[str, Any]) -> None:
    kept: list[int] = []
    for rank in (0, 1):
        entries = diary(killed, rank)
        first, second = dict.fromkeys(pid for pid, _, _ in entries)
        # What the first attempt did after its checkpoint is lost with it.
        kept += [
            i for pid, step, ids in entries if pid == first and step < CHECKPOINT_EVERY for i in ids
        ]
        kept += [i for pid, _, ids in entries if pid == second for i in ids]
        assert [step for pid, step, _ in entries if pid == second] == list(
            range(CHECKPOINT_EVERY, STEPS)
        )
    assert sorted(kept) == list(range(STEPS * 32))


def test_the_loss_falls_and_the_ranks_agree(killed: dict[str, Any]) -> None:
    losses = killed["result"]["losses"]
    assert losses[-1] < losses[0]
    assert killed["result"]["weights_equal"]


def test_only_the_last_checkpoints_are_kept_whole_with_both_ranks_shards(
    killed: dict[str, Any],
) -> None:
    steps = []
    for folder in checkpoints(killed):
        manifest = checkpoint.verify(folder)
        steps.append(manifest.step)
        shards = [name for name in manifest.files if "optim_states" in name]
        assert len(shards) == 2
    assert steps == [STEPS - CHECKPOINT_EVERY, STEPS]


def test_progress_is_seen_between_checkpoints(killed: dict[str, Any]) -> None:
    steps = [record["step"] for record in killed["progress"]]
    assert SEEN_AT in steps
    assert killed["progress"][-1]["parts"]["loss"] > 0


def test_warnings_of_rank_0_reach_the_driver(killed: dict[str, Any]) -> None:
    first, restart, second = killed["warnings"]
    assert [first, second] == ["begins at step 0", f"begins at step {CHECKPOINT_EVERY}"]
    assert re.match(r"tiny: (a worker|worker [01, ]+) died, once without a new checkpoint", restart)


def test_everything_listens_on_loopback_alone(killed: dict[str, Any]) -> None:
    seen = set().union(*killed["listening"])
    assert seen
    assert seen <= {"127.0.0.1", "[::ffff:127.0.0.1]", "[::1]"}


def test_workers_use_their_cpus_and_leave_no_files_behind(killed: dict[str, Any]) -> None:
    environment = killed["result"]["environment"]
    assert environment["OMP_NUM_THREADS"] == "1"
    assert list(Path(environment["TMPDIR"]).glob("sbf-checkpoint-*")) == []


def test_a_users_mistake_on_one_rank_arrives_as_its_line_at_the_first_try(
    ray: None, tmp_path: Path
) -> None:
    with KeptWorkers(Workers(count=2, max_failures=3)) as kept, pytest.raises(UserError) as caught:
        run_workers(
            tiny_worker.refuse_on_rank_1,
            {"diary": str(tmp_path)},
            name="mistake",
            storage=tmp_path / "runs",
            logs=tmp_path / "logs",
            kept=kept,
        )
    assert str(caught.value) == "batch size 7: must be a multiple of 2"
    # Rank 0 may be ended before it has begun.
    assert len(list(tmp_path.glob("tries-of-1-*"))) == 1
    assert len(list(tmp_path.glob("tries-of-0-*"))) <= 1


def test_any_other_error_arrives_with_the_workers_traceback(ray: None, tmp_path: Path) -> None:
    with KeptWorkers(Workers(count=1, max_failures=0)) as kept, pytest.raises(RunError) as caught:
        run_workers(
            tiny_worker.break_down,
            {"layer": "conv1"},
            name="bug",
            storage=tmp_path / "runs",
            logs=tmp_path / "logs",
            kept=kept,
        )
    log = tmp_path / "logs" / "bug-1.log"
    assert str(caught.value) == (
        "bug: worker 0 raised KeyError: 'no such layer: conv1', once without a new checkpoint "
        f"(workers.max_failures = 0); the workers' logs are in {log}; run the same command again "
        "to resume from the last checkpoint"
    )
    assert re.search(r"break_down[\s\S]*KeyError: 'no such layer: conv1'", log.read_text())


def test_workers_find_the_users_network_where_the_driver_works(
    ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "mine.py").write_text(
        "from torch import nn\ndef make(num_classes):\n    return nn.Linear(4, num_classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    with KeptWorkers(Workers(count=1, max_failures=0)) as kept:
        found = run_workers(
            tiny_worker.build_from_relative_path,
            {"model": "nets/mine.py:make"},
            name="own",
            storage=tmp_path / "runs",
            logs=tmp_path / "logs",
            kept=kept,
        )
    assert found == {"directory": str(tmp_path), "outputs": 3}


def test_workers_stay_for_the_next_stage_and_others_come_where_one_has_died(
    ray: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {"storage": tmp_path / "runs", "logs": tmp_path / "logs"}
    with KeptWorkers(Workers(count=2, max_failures=0, max_lost=0)) as kept:

        def pids(stage: str) -> list[int]:
            return run_workers(tiny_worker.pids, {}, name=stage, kept=kept, **folders)["pids"]

        storage = folders["storage"]
        begin_workers(tiny_worker.note_pid, storage=storage, kept=kept, counts=[1, 2])
        first = pids("one")
        assert tiny_worker.noted_pids() >= set(first)  # the workers that were begun before
        assert pids("two") == first
        with pytest.raises(RunError, match=r"broken: worker [01] raised KeyError"):
            run_workers(tiny_worker.break_down, {"layer": "x"}, name="broken", kept=kept, **folders)
        third = pids("three")
        assert not set(third) & set(first)
        os.kill(third[1], signal.SIGKILL)
        gone = psutil.wait_procs([psutil.Process(third[0])], timeout=120)[0]
        assert gone, "Ray Train ends the others"
        assert not set(pids("four")) & set(third)
    assert caplog.messages == []
    assert not (tmp_path / "runs" / ".ray-train").exists()


def waits_for_ray() -> bool:
    return "ray-train" in {thread.name for thread in threading.enumerate()}


def test_a_raylet_that_dies_while_workers_are_idle_is_started_again_once_nobody_waits_for_it(
    ray: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"storage": tmp_path / "runs", "logs": tmp_path / "logs"}
    restart, waited = local_ray.restart, []

    def watched_restart() -> None:
        waited.append(waits_for_ray())
        restart()

    monkeypatch.setattr(local_ray, "restart", watched_restart)
    with KeptWorkers(Workers(count=1)) as kept:
        first = run_workers(tiny_worker.pids, {}, name="one", kept=kept, **folders)
        (raylet,) = [p for p in psutil.Process().children() if p.name() == local_ray.RAYLET]
        raylet.kill()
        eventually(lambda: local_ray.dead_server() == local_ray.RAYLET)
        assert run_workers(tiny_worker.pids, {}, name="two", kept=kept, **folders) != first
    assert waited == [False]
    (message,) = caplog.messages
    assert message.startswith("two: Ray's raylet died, once without a new checkpoint")


def test_an_interrupt_while_workers_start_leaves_no_thread_that_waits_for_ray(
    ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_group, "_CUT_OFF_SECONDS", 120.0)  # this machine may be busy
    with (
        pytest.raises(Interrupted, match="SIGINT"),
        signals_raise(),
        KeptWorkers(Workers(count=1)) as kept,
    ):
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        run_workers(
            tiny_worker.pids,
            {},
            name="cut",
            storage=tmp_path / "runs",
            logs=tmp_path / "logs",
            kept=kept,
        )
    assert not waits_for_ray()


def test_what_rays_controller_imports_does_not_import_torch() -> None:
    program = "import sys, launchers.on_ray.ray_train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
