"""How many workers an attempt gets; attempts on real workers are in test_ray_train.py."""

from contextlib import nullcontext
from pathlib import Path

import pytest
from waiting import eventually

from launchers.interruption import Interrupted, Notice
from launchers.on_ray import attempts, local_ray, worker_group
from launchers.on_ray.worker_group import KeptWorkers
from sbf_dist.errors import RunError, UserError
from sbf_dist.recipe import Workers

ELASTIC = Workers(count=(2, 8), cpus=2, start_timeout=3)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A cluster whose CPUs and GPUs a test sets, and whose time passes only in waiting."""
    there = {"CPU": 0.0, "GPU": 0.0, "now": 0.0}
    monkeypatch.setattr(attempts, "_there", lambda: (there["CPU"], there["GPU"]))
    monkeypatch.setattr(attempts, "runs_locally", lambda: False)
    monkeypatch.setattr(attempts.held_places, "asked_for", lambda place, count: nullcontext())
    monkeypatch.setattr(attempts.time, "monotonic", lambda: there["now"])
    monkeypatch.setattr(attempts.time, "sleep", lambda s: there.update(now=there["now"] + s))
    return there


@pytest.mark.parametrize(("cpus", "count"), [(4, 2), (11, 4), (12, 4), (16, 8), (64, 8)])
def test_the_largest_number_that_has_a_place_and_suits_the_training_is_taken(
    cluster: dict[str, float], cpus: float, count: int
) -> None:
    cluster["CPU"] = cpus
    assert attempts._number_of_workers(ELASTIC, [2, 4, 8], Notice()) == count


def test_gpus_count_too(cluster: dict[str, float]) -> None:
    cluster.update(CPU=64, GPU=3)
    workers = ELASTIC.model_copy(update={"gpus": 0.5})
    assert attempts._number_of_workers(workers, range(2, 9), Notice()) == 6


def test_fewer_than_the_minimum_is_one_line_with_what_is_there_and_what_was_asked(
    cluster: dict[str, float],
) -> None:
    cluster["CPU"] = 3
    with pytest.raises(UserError) as caught:
        attempts._number_of_workers(ELASTIC, [2, 4, 8], Notice())
    assert str(caught.value) == (
        "workers.count = [2, 8]: there are 3 CPUs and 0 GPUs, enough for 1 workers with "
        "workers.cpus = 2 and workers.gpus = 0; at least 2 are needed"
    )
    assert cluster["now"] >= ELASTIC.start_timeout


def test_machines_that_come_in_time_are_waited_for(
    cluster: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([(0, 0), (3, 0), (8, 0)])
    monkeypatch.setattr(attempts, "_there", lambda: next(looks))
    workers = ELASTIC.model_copy(update={"start_timeout": 60})
    assert attempts._number_of_workers(workers, [2, 4, 8], Notice()) == 4


def test_a_signal_ends_the_waiting(cluster: dict[str, float]) -> None:
    with pytest.raises(Interrupted):
        attempts._number_of_workers(ELASTIC, [2], Notice(signum=15))
    assert cluster["now"] == 0


def test_places_that_others_use_are_one_line_with_what_is_free(
    cluster: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    cluster.update(CPU=8, GPU=2)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 3.0})
    with pytest.raises(UserError) as caught:
        attempts._check_used_by_others(ELASTIC, 4)
    assert str(caught.value) == (
        "workers.count = [2, 8]: no room for 4 workers within 3 s (workers.start_timeout): of 8 "
        "CPUs and 2 GPUs, 3 and 0 are free; others use the rest"
    )
    cluster["CPU"] = 7  # a machine has gone meanwhile: the next attempt takes fewer
    attempts._check_used_by_others(ELASTIC, 4)


def test_an_autoscaler_is_asked_for_the_least_number(
    cluster: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        attempts.held_places,
        "asked_for",
        lambda place, count: nullcontext(asked.append((place, count))),
    )
    with pytest.raises(UserError):
        attempts._number_of_workers(ELASTIC, [2, 4, 8], Notice())
    assert asked == [({"CPU": 2}, 2)]


def test_a_gcs_that_died_while_no_workers_were_at_work_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attempts, "runs_locally", lambda: True)
    monkeypatch.setattr(local_ray, "dead_servers", lambda: [local_ray.GCS])
    monkeypatch.setattr(worker_group, "_WATCH_SECONDS", 0.01)
    logs = tmp_path / "logs"
    with KeptWorkers(Workers()) as kept, pytest.raises(RunError) as caught:
        eventually(lambda: caplog.messages)  # before there is a next training
        assert caplog.messages[0].startswith("Ray's gcs_server died: this run ends within a minute")
        attempts.run_workers(dict, {}, name="distill", storage=tmp_path, logs=logs, kept=kept)
    assert str(caught.value) == (
        f"distill: Ray's gcs_server died; the workers' logs are in {logs}/distill-1.log; run the "
        "same command again to resume from the last checkpoint"
    )
