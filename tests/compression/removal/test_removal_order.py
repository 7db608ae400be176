import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sbf_dist.compression.removal.removal_order import Order


def test_scores_are_put_in_order_and_add_up():
    order = Order.of_scores(torch.tensor([3.0, 1.0, 2.0]))
    assert order.channels == [1, 2, 0]
    assert order.losses == [1.0, 3.0, 6.0]
    assert [order.loss(k) for k in range(4)] == [0.0, 1.0, 3.0, 6.0]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12))
def test_losses_are_the_largest_convex_function_below_those_given(steps):
    losses = np.cumsum(steps)
    found = np.array(Order.of_losses(list(range(len(steps))), losses).losses)
    assert (found <= losses + 1e-9).all()
    slopes = np.diff(found, prepend=0.0)
    assert (np.diff(slopes) >= -1e-9).all()
    assert np.isclose(found[-1], losses[-1])
    # Every chord of the given points lies above it, and a convex function touches some of them.
    points = np.concatenate([[0.0], losses])
    for k in range(1, len(points) - 1):
        chords = [
            points[a] + (points[b] - points[a]) * (k - a) / (b - a)
            for a in range(k + 1)
            for b in range(k, len(points))
            if a < b
        ]
        assert found[k - 1] >= min(chords) - 1e-9
