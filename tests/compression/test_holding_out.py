"""Images that are held out are of other sources than those that are fitted to."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import pictures, small

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.holding_out import LARGEST, split
from sbf_dist.compression.one_shot import compress
from sbf_dist.errors import UserError
from sbf_dist.settings import Compression


def numbered(count, sources=None, batch=7):
    images = torch.arange(count, dtype=torch.float)[:, None, None, None].expand(-1, 1, 2, 2)
    return Calibration(images.split(batch), sources=sources)


def numbers(images):
    return [int(one) for batch in images for one in batch[:, 0, 0, 0]]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80))
def test_sources_are_on_one_side_and_all_images_on_some(sources):
    images = numbered(len(sources), sources)
    fit, held = split(images)
    ours = numbers(fit)
    theirs = [] if held is None else numbers(held)
    assert sorted(ours + theirs) == list(range(len(sources)))
    assert not {sources[i] for i in ours} & {sources[i] for i in theirs}
    assert held is None or len(theirs) >= 1
    assert fit.sources == [sources[i] for i in ours]


@given(st.integers(8, 600))
def test_without_sources_whole_runs_are_held_out(count):
    fit, held = split(numbered(count))
    assert held is not None
    ours, theirs = numbers(fit), numbers(held)
    assert sorted(ours + theirs) == list(range(count))
    assert 2 <= len(theirs) <= min(count - 2, LARGEST + 64)
    runs = 1 + sum(after - before > 1 for before, after in itertools.pairwise(theirs))
    assert runs <= 4


def test_few_images_or_one_source_leave_nothing_to_hold_out():
    assert split(numbered(7))[1] is None
    assert split(numbered(40, ["one film"] * 40))[1] is None


def test_the_same_images_come_each_time():
    fit, held = split(numbered(50, [index // 5 for index in range(50)]))
    assert held is not None
    assert numbers(fit) == numbers(fit)
    assert numbers(held) == numbers(held)


def test_sources_that_are_not_as_many_are_refused():
    with pytest.raises(UserError, match="3 sources are named for 4 images"):
        numbered(4, [1, 2, 3])


@pytest.mark.parametrize("removal", [0.0, 1.0])
def test_a_plan_says_that_too_few_images_judged_nothing(removal):
    settings = Compression(macs=0.8, removal=removal)
    _, plan = compress(small(), pictures(3), settings)
    assert plan.fidelity is None
    wanted = "none of 3 calibration images could be held out; give 8 or more"
    assert any(f"Not judged: {wanted}" in line for line in plan.explanation)
    assert f", not judged: {wanted}" in plan.summary()
    _, plan = compress(small(), pictures(8), settings)
    assert plan.fidelity is not None
    assert "not judged" not in plan.summary().lower()


def test_a_plan_that_changes_nothing_has_nothing_to_judge():
    _, plan = compress(small(), pictures(3), macs=1.0)
    assert "not judged" not in plan.summary()
