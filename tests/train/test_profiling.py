"""A trace has the steps that were asked for."""

import json
from pathlib import Path

import torch

from sbf_dist.train.profiling import profiled


def operators(file: Path) -> list[str]:
    events = json.loads(file.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "cpu_op"]


def run(file: Path, steps: tuple[int, int], *, batches: int, start_step: int = 0) -> list[int]:
    """Multiply in each step, two batches long, as often as the step's number says."""
    seen = []
    stream = profiled(range(batches), steps, file, start_step=start_step, passes=2)
    for number in stream:
        seen.append(number)
        for _ in range(start_step + number // 2):
            torch.ones(2, 2) @ torch.ones(2, 2)
    return seen


def test_a_trace_has_the_steps_that_were_asked_for_and_no_others(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "trace.json"
    assert run(file, (2, 4), batches=12) == list(range(12))
    assert operators(file).count("aten::mm") == 2 * (2 + 3)


def test_a_trace_ends_with_the_training(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    run(file, (2, 9), batches=6)
    assert operators(file).count("aten::mm") == 2 * 2


def test_steps_are_counted_from_where_a_training_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    run(file, (11, 12), batches=6, start_step=10)
    assert operators(file).count("aten::mm") == 2 * 11


def test_of_steps_that_are_done_already_there_is_no_trace(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    run(file, (2, 4), batches=6, start_step=10)
    assert not file.exists()
