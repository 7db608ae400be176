import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbf_dist.errors import UserError
from sbf_dist.peers.shrinking import NUM_TRIED_STEPS, in_proportion, longest_within

SAVINGS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def cost_after(savings: list[int]):
    return lambda steps: sum(savings) - sum(savings[step] for step in steps)


@settings(deadline=None)
@given(SAVINGS, st.floats(0.0, 1.0))
def test_the_limit_is_kept_and_no_late_step_is_taken_in_vain(savings, share):
    limit = share * sum(savings)
    cost = cost_after(savings)
    taken = longest_within(range(len(savings)), cost, limit, "it")
    assert cost(taken) <= limit
    for step in taken[-NUM_TRIED_STEPS // 4 :]:
        assert cost([other for other in taken if other != step]) > limit
    # All that was left out comes late: nothing before the first that could be left out is missing.
    assert len(set(taken)) == len(taken)


def test_a_limit_that_needs_nothing_takes_nothing():
    assert longest_within([0, 1], cost_after([3, 4]), 7, "it") == []


def test_a_limit_out_of_reach_is_refused_with_the_name_of_the_method():
    with pytest.raises(UserError, match=r"ghost at 0\.1: even its smallest network costs more"):
        longest_within([0], lambda steps: 10 - len(steps), 5, "ghost at 0.1")


def test_layers_shrink_alike_and_keep_their_least():
    steps = in_proportion({"a": 4, "b": 8}, 0.25)
    assert [name for name, _ in steps].count("a") == 3
    assert [name for name, _ in steps].count("b") == 6
    for length in range(len(steps)):
        gone = [name for name, _ in steps[:length]]
        assert abs(gone.count("a") / 4 - gone.count("b") / 8) <= 1 / 4
