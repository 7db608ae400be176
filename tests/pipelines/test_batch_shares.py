from hypothesis import given
from hypothesis import strategies as st

from pipelines.batch_shares import shares_of_batch


@given(st.integers(1, 300), st.floats(0, 1), st.booleans())
def test_a_batch_is_shared_out_as_wanted_and_leaves_no_part_out(total, share, pairs):
    unit = 2 if pairs else 1
    total *= unit
    sizes = shares_of_batch(total, share, pairs=pairs)
    assert sum(sizes.values()) == total
    assert min(sizes.values()) >= 0
    assert all(size % unit == 0 for size in sizes.values())
    assert abs(sizes["labelled"] - share * total) <= unit
    if total >= 2 * unit:
        assert (sizes["labelled"] > 0) == (share > 0)
        assert (sizes["unlabelled"] > 0) == (share < 1)
