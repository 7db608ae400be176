import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.estimate.machines import MACHINES, RESNET50_MACS
from launchers.estimate.timing import (
    OVERLAP,
    Work,
    all_reduce_time,
    ring_time,
    step_time,
    tree_time,
)

WORK = Work(RESNET50_MACS, 0, 175, 0, 4 * 25.56e6)
MACHINE = MACHINES["p4d.24xlarge"]


def test_one_gpu_trains_resnet50_at_the_speed_that_was_published():
    assert 128 / step_time(WORK, MACHINE, gpus=1, images=128).total == pytest.approx(2470)


def test_one_gpu_has_nobody_to_exchange_gradients_with_or_to_wait_for():
    alone = step_time(WORK, MACHINE, gpus=1, images=128)
    assert alone.communication == alone.stragglers == 0


def test_a_ring_sends_twice_what_the_others_hold():
    size, bytes_per_s = 8e9, 1e9
    assert ring_time(size, 4, bytes_per_s, 0) == pytest.approx(2 * 3 / 4 * 8)
    assert ring_time(size, 1, bytes_per_s, 1) == 0


def test_many_members_are_reached_sooner_by_a_tree_than_by_a_ring():
    few_bytes = 1e3
    assert tree_time(few_bytes, 512, 1e9, 1e-5) < ring_time(few_bytes, 512, 1e9, 1e-5)
    assert tree_time(few_bytes, 1, 1e9, 1e-5) == 0


@given(gpus=st.sampled_from([1, 2, 4, 8, 16, 64, 512]), size=st.floats(1e3, 1e10))
def test_gradients_take_longer_the_more_they_are_and_the_more_have_to_get_them(gpus, size):
    now = all_reduce_time(size, MACHINE, gpus)
    assert now <= all_reduce_time(2 * size, MACHINE, gpus)
    assert now <= all_reduce_time(size, MACHINE, 2 * gpus) * (1 + 1e-9)


@given(gpus=st.sampled_from([8, 16, 64, 256, 512]), images=st.integers(1, 512))
def test_what_is_hidden_behind_the_backward_pass_never_makes_a_step_longer(gpus, images):
    hidden = step_time(WORK, MACHINE, gpus=gpus, images=images, overlap=OVERLAP)
    shown = step_time(WORK, MACHINE, gpus=gpus, images=images)
    assert hidden.total <= shown.total
    assert math.isfinite(shown.total)


def test_what_bounds_a_step_is_named():
    assert step_time(WORK, MACHINE, gpus=8, images=128).bound == "compute"
    assert step_time(WORK, MACHINE, gpus=8, images=1).bound == "few images"
    large = Work(RESNET50_MACS, 0, 175, 0, 1e12)
    assert step_time(large, MACHINE, gpus=64, images=128).bound == "communication"
    tiny = Work(1e6, 0, 1, 0, 1e3)
    assert step_time(tiny, MACHINE, gpus=8, images=10_000).bound == "images"
