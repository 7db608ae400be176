import time

import pytest
import torch
from torch import nn

from sbf_dist.distill.teacher_costs import Meter, TeacherCost


def measured(*passes: tuple[int, float]) -> TeacherCost:
    meter = Meter()
    for images, seconds in passes:
        with meter.measured(torch.zeros(images, 1)):
            time.sleep(seconds)
    return meter.cost(nn.Linear(1000, 250))


def test_time_is_that_of_an_image_without_the_first_pass() -> None:
    assert 10 <= measured((2, 0.2), (4, 0.04), (4, 0.04)).ms_per_image < 25


def test_the_first_pass_counts_where_it_is_the_only_one() -> None:
    assert 10 <= measured((2, 0.02)).ms_per_image < 100


def test_memory_is_that_of_parameters_and_buffers() -> None:
    assert measured((1, 0.0)).parameters_mb == pytest.approx(4 * 250 * 1001 / 1e6, abs=1e-3)


def test_it_is_said_on_one_line() -> None:
    assert str(TeacherCost(1.234, 5.67, None)) == "1.23 ms per image, 5.67 MB of parameters"
    assert str(TeacherCost(1.234, 5.67, 890.1)).endswith("parameters, 890 MB for a batch")
