import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from launchers.on_ray.failures import AttemptError, Budget, judged, judged_start
from sbf_dist.recipe import Workers


def lost() -> AttemptError:
    return AttemptError(lost=True, cause="worker 1 died", details="")


def error() -> AttemptError:
    return AttemptError(lost=False, cause="worker 0 raised KeyError: 'x'", details="")


def test_errors_and_lost_workers_have_budgets_of_their_own() -> None:
    budget = Budget(Workers(max_failures=1, max_lost=2), progress=lambda: None)
    assert [budget.charge(f) for f in (lost(), error(), lost())] == [True, True, True]
    assert not budget.charge(error())
    assert not budget.charge(lost())
    assert budget.described(lost()) == ("3 times without a new checkpoint (workers.max_lost = 2)")


def test_a_new_checkpoint_begins_the_count_anew() -> None:
    checkpoints = {"a-10"}
    budget = Budget(Workers(max_lost=1), progress=lambda: set(checkpoints))
    for step in range(20, 100, 10):
        assert budget.charge(lost())
        checkpoints.add(f"a-{step}")
    assert budget.charge(lost())
    assert not budget.charge(lost())


@pytest.mark.parametrize(
    ("failures", "is_lost", "cause"),
    [
        ({1: KeyError("conv1"), 2: KeyError("conv1")}, False, "worker 1 raised KeyError: 'conv1'"),
        ({0: RuntimeError("a\nb")}, False, "worker 0 raised RuntimeError: a"),
        ({0: RuntimeError()}, False, "worker 0 raised RuntimeError"),
        ({1: ActorDiedError(), 0: RuntimeError("Gloo: reset")}, True, "worker 1 died"),
        ({0: RuntimeError("[..] Connection closed by peer [127.0.0.1]")}, True, "a worker died"),
        (
            {0: RuntimeError("Connection closed by peer"), 1: ValueError("bad")},
            False,
            "worker 1 raised ValueError: bad",
        ),
    ],
)
def test_what_an_attempt_ended_with_is_told_from_what_that_leads_to(
    failures: dict[int, Exception], is_lost: bool, cause: str
) -> None:
    found = judged(failures, "all of it")
    assert (found.lost, found.cause, found.details) == (is_lost, cause, "all of it")


@pytest.mark.parametrize(
    ("error", "lost", "cause"),
    [
        (
            RuntimeError("Gloo: timed out: Connection refused\nmore"),
            True,
            "RuntimeError: Gloo: timed",
        ),
        (RuntimeError("no network interface"), False, "RuntimeError: no network interface"),
        (ActorDiedError(), True, "ActorDiedError: "),
        (RayTaskError("f", "traceback", ValueError("bad")), False, "ValueError: bad"),
    ],
)
def test_workers_that_do_not_start_are_told_from_those_whose_peers_are_gone(
    error: Exception, lost: bool, cause: str
) -> None:
    found = judged_start(error, "all of it")
    assert found.lost is lost
    assert found.cause.startswith(f"the workers did not start: {cause}")


def test_a_machine_that_was_lost_is_named() -> None:
    error = WorkerHealthCheckFailedError(
        "A worker health check failed.\nWorker info: Worker(node_ip='10.0.0.3', pid=7)\nThe actor "
        "died because its node has died.",
        failure=ActorDiedError(),
    )
    found = judged({1: error}, "")
    assert (found.lost, found.cause) == (True, "worker 1 died with machine 10.0.0.3")
