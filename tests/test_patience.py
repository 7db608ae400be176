import threading

import pytest

from sbf_dist import patience
from sbf_dist.errors import RunError
from sbf_dist.object_storage import StoreUnreachableError
from sbf_dist.patience import patiently

AWAY = StoreUnreachableError("s3://b/x: no answer")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(patience, "_FIRST_PAUSE_SECONDS", 0.01)


def away(times: int):
    """What does not answer that often, and then 7."""
    left = [AWAY] * times

    def ask() -> int:
        if left:
            raise left.pop()
        return 7

    return ask


def test_a_store_is_asked_again_with_one_line_at_the_start_and_one_at_the_end(caplog):
    assert patiently(away(3)) == 7
    assert caplog.messages == [
        "s3://b/x: no answer; retrying for 0.5 s",
        "the store answers again",
    ]


def test_one_that_answers_at_once_is_not_spoken_of(caplog):
    assert patiently(away(0)) == 7
    assert not caplog.messages


def test_one_that_stays_away_is_given_up_through_no_mistake_of_the_users():
    with pytest.raises(
        RunError, match=r"^s3://b/x: no answer; gave up after 0\.5 s; run the same "
    ):
        patiently(away(1000))


def test_who_is_stopped_does_not_wait():
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(RunError, match=r"^s3://b/x: no answer$"):
        patiently(away(1000), stopped)


def test_another_error_is_raised_at_once():
    def ask() -> None:
        raise FileNotFoundError("x")

    with pytest.raises(FileNotFoundError):
        patiently(ask)
