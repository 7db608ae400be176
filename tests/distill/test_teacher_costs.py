from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sbf_dist.distill import teacher_costs
from sbf_dist.distill.teacher_costs import Meter, TeacherCost


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that goes on only where a test says so."""
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(teacher_costs, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def measured(clock: SimpleNamespace, *passes: tuple[int, float]) -> TeacherCost:
    meter = Meter()
    for images, seconds in passes:
        with meter.measured(torch.zeros(images, 1)):
            clock.now += seconds
    return meter.cost(nn.Linear(1000, 250))


def test_time_is_that_of_an_image_without_the_first_pass(clock: SimpleNamespace) -> None:
    assert measured(clock, (2, 0.2), (4, 0.04), (4, 0.08)).ms_per_image == 15


def test_the_first_pass_counts_where_it_is_the_only_one(clock: SimpleNamespace) -> None:
    assert measured(clock, (2, 0.02)).ms_per_image == 10


def test_memory_is_that_of_parameters_and_buffers(clock: SimpleNamespace) -> None:
    found = measured(clock, (1, 0.0)).parameters_mb
    assert found == pytest.approx(4 * 250 * 1001 / 1e6, abs=1e-3)


def test_it_is_said_on_one_line() -> None:
    assert str(TeacherCost(1.234, 5.67, None)) == "1.23 ms per image, 5.67 MB of parameters"
    assert str(TeacherCost(1.234, 5.67, 890.1)).endswith("parameters, 890 MB for a batch")
