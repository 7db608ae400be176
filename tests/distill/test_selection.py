import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sbf_dist.distill.selection import select
from sbf_dist.settings import PseudoLabels

CLASSES = np.array([0, 1, 0, 2, 1, 0], np.int64)
CONFIDENCE = np.array([0.9, 0.5, 0.7, 0.4, 0.8, 0.7], np.float32)


def test_without_settings_every_image_is_used():
    assert select(CLASSES, CONFIDENCE, PseudoLabels()).all()


def test_the_threshold_itself_is_confident_enough():
    half = np.array([0.5, 0.49999, 0.50001], np.float32)
    assert select(np.zeros(3, np.int64), half, PseudoLabels(threshold=0.5)).tolist() == [
        True,
        False,
        True,
    ]


def test_the_most_confident_of_each_class_are_used_ties_to_the_earlier():
    used = select(CLASSES, CONFIDENCE, PseudoLabels(per_class=2))
    assert used.tolist() == [True, True, True, True, True, False]
    assert select(CLASSES, CONFIDENCE, PseudoLabels(per_class=1)).tolist() == [
        True,
        False,
        False,
        True,
        True,
        False,
    ]


def test_what_is_below_the_threshold_does_not_fill_a_class():
    used = select(CLASSES, CONFIDENCE, PseudoLabels(threshold=0.6, per_class=3))
    assert used.tolist() == [True, False, True, False, True, True]


def test_a_threshold_that_nothing_reaches_uses_nothing():
    assert not select(CLASSES, CONFIDENCE, PseudoLabels(threshold=0.95, per_class=2)).any()


def test_no_images_no_choice():
    none = select(
        np.zeros(0, np.int64), np.zeros(0, np.float32), PseudoLabels(threshold=0.5, per_class=3)
    )
    assert none.shape == (0,)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1, width=32)), max_size=30),
    st.floats(0, 1, width=32, exclude_max=True),
    st.integers(1, 5),
)
def test_each_class_gives_its_best_images_and_no_more(rows, threshold, per_class):
    classes = np.array([c for c, _ in rows], np.int64)
    confidence = np.array([p for _, p in rows], np.float32)
    used = select(classes, confidence, PseudoLabels(threshold=threshold, per_class=per_class))
    for label in set(classes.tolist()):
        members = classes == label
        able = members & (confidence >= np.float32(threshold))
        chosen = used & members
        assert chosen.sum() == min(per_class, able.sum())
        assert not (chosen & ~able).any()
        left = able & ~chosen
        if chosen.any() and left.any():
            assert confidence[chosen].min() >= confidence[left].max()
