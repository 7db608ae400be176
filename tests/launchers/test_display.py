import io
import re

import pytest
from rich.console import Console

from launchers import display as module
from launchers.display import SECONDS_BETWEEN_LINES, Display, results_table


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def display_on(*, terminal: bool) -> tuple[Display, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, highlight=False)
    return Display(console), text


def test_without_a_terminal_a_line_comes_every_ten_seconds_at_most(clock) -> None:
    display, text = display_on(terminal=False)
    for second in range(95):
        clock[0] += 1
        for title in (f"part {second % 3}", "other"):  # other titles bring no more lines
            display.show({"title": title, "step": second, "steps": 100})
    assert len(text.getvalue().splitlines()) == 95 // SECONDS_BETWEEN_LINES


def test_what_is_done_in_less_has_no_line_but_those_of_its_stage(clock) -> None:
    display, text = display_on(terminal=False)
    with display.stage(1, 7, "prepare"):
        for step in range(9):
            clock[0] += 1
            display.show({"title": "images", "step": step, "steps": 8})
    assert text.getvalue() == "[1/7] prepare\n  done in 9.0 s\n"


def test_rate_and_time_left_are_estimated_where_the_work_says_none(clock) -> None:
    display, text = display_on(terminal=False)
    display.show({"title": "images", "step": 20, "steps": 100})
    clock[0] += 16
    display.show({"title": "images", "step": 60, "steps": 100})
    clock[0] += 16
    display.show({"title": "files", "step": 0, "steps": 10**6})
    clock[0] += 16
    display.show({"title": "files", "step": 40_000, "steps": 10**6})
    assert text.getvalue().splitlines() == [
        "  images: 60/100  2.5/s  16 s left",
        "  files: 0/1000000",
        "  files: 40000/1000000  2,500/s  384 s left",
    ]


def test_those_that_the_work_says_are_shown(clock) -> None:
    display, text = display_on(terminal=False)
    record = {"title": "shards", "step": 6, "steps": 9, "rate": "7 MB/s", "seconds_left": 42}
    clock[0] += 20
    display.show(record)
    clock[0] += 20
    parts = {"parts": {"loss": 0.5}, "images_per_s": 300, "seconds_left": 9.0}
    display.show({"title": "teacher", "step": 1, "steps": 3, **parts})
    assert text.getvalue().splitlines() == [
        "  shards: 6/9  7 MB/s  42 s left",
        "  teacher: 1/3  loss 0.500  300 images/s  9 s left",
    ]


def test_a_terminal_has_a_bar_with_rate_and_time_left() -> None:
    display, text = display_on(terminal=True)
    with display, display.stage(1, 2, "prepare"):
        display.wait("starting the workers")
        display._bars.refresh()
        display.show({"title": "images", "step": 0, "steps": 50, "rate": "7 images/s"})
        display.show({"title": "images", "step": 25, "steps": 50, "rate": "7 images/s"})
        display._bars.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())
    assert "starting the workers" in shown
    assert re.search(r"images [━╺╸]+ 25/50 -:--:-- 7 images/s", shown)
    assert "  done in 0.0 s\n" in shown


def test_waiting_brings_no_line_without_a_terminal(clock) -> None:
    display, text = display_on(terminal=False)
    clock[0] += 60
    display.wait("starting the workers")
    assert text.getvalue() == ""


def test_networks_without_classes_are_compared_by_their_error() -> None:
    row = {"name": "dense", "top1": None, "macs": 2e6, "params": 3e3, "latency_ms": 1.5}
    student = row | {"name": "student", "agreement": None, "kl": None, "error": 0.0068}
    text = io.StringIO()
    console = Console(file=text, width=100)
    console.print(results_table([row, student]))
    assert "error %" in text.getvalue() and "agrees" not in text.getvalue()
    assert text.getvalue().splitlines()[-1].split() == [
        "student",
        "-",
        "0.68",
        "2.00",
        "3.0",
        "1.50",
    ]
    console.print(results_table([row, row | {"agreement": 0.9, "kl": 0.01}]))
    assert text.getvalue().splitlines()[-1].split()[2:4] == ["90.0", "0.010"]


def test_networks_of_classes_and_other_outputs_are_compared_by_both() -> None:
    row = {"name": "dense", "top1": None, "macs": 2e6, "params": 3e3, "latency_ms": 1.5}
    text = io.StringIO()
    both = row | {"agreement": 0.9, "kl": 0.01, "error": 0.0068}
    Console(file=text, width=80).print(results_table([row, both]))
    last = text.getvalue().splitlines()[-1]
    assert last.split()[2:5] == ["90.0", "0.010", "0.68"]
    assert max(map(len, text.getvalue().splitlines())) <= 80
