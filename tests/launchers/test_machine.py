import logging

import pytest

from launchers import machine
from launchers.machine import check_machine, warn_of_idle_gpus
from sbf_dist.errors import UserError


@pytest.mark.parametrize(("workers", "cpus"), [(0, 1), (1, 0)])
def test_no_workers_and_no_cpus_are_refused(workers: int, cpus: int) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        check_machine(workers, cpus)


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_gpus", lambda: 1)
    with pytest.raises(UserError, match=r"needs 2 GPUs, this machine has 1"):
        check_machine(1, 1, gpus_per_worker=2)


@pytest.mark.parametrize(("there", "named"), [(1, "a GPU"), (4, "4 GPUs")])
def test_gpus_that_no_worker_uses_are_named_with_the_key_that_uses_them(
    there: int,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(machine, "available_gpus", lambda: there)
    with caplog.at_level(logging.WARNING):
        warn_of_idle_gpus(1)
        assert not caplog.messages
        warn_of_idle_gpus(0)
    assert caplog.messages == [
        f"workers.gpus = 0: all work is done on CPUs, but this machine has {named}; "
        "workers.gpus=1 gives each worker one"
    ]


def test_a_machine_without_a_gpu_is_no_cause_for_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "available_gpus", lambda: 0)
    warn_of_idle_gpus(0)
    assert not caplog.messages
