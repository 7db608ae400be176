from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import write

from sbf_dist.distill.selection import check_choice, choose, select, thresholds, unused_classes
from sbf_dist.distill.stored_labels import StoredLabels, read
from sbf_dist.errors import UserError
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


# --- thresholds of classes -----------------------------------------------------------------------


def test_a_fixed_threshold_is_that_of_all_classes():
    found = thresholds(CLASSES, CONFIDENCE, PseudoLabels(threshold=0.7), count=4)
    np.testing.assert_array_equal(found, np.float32([0.7] * 4))


def test_an_adaptive_threshold_falls_with_the_share_of_images_that_reach_it():
    classes = np.array([0] * 4 + [1] * 3 + [2] * 3)
    confidence = np.float32([0.9, 0.9, 0.8, 0.1, 0.9, 0.8, 0.1, 0.9, 0.1, 0.2])
    settings = PseudoLabels(threshold=0.8, adaptive=True)
    found = thresholds(classes, confidence, settings, count=4)
    # Three, two and one reach it: b / (2 - b) for b = 1, 2/3, 1/3; of class 3 none is predicted.
    np.testing.assert_allclose(found, [0.8, 0.8 / 2, 0.8 / 5, 0], rtol=1e-6)
    used = select(classes, confidence, settings)
    assert used.tolist() == [True] * 3 + [False] + [True] * 2 + [False, True, False, True]


def test_all_images_of_a_class_that_never_reaches_the_threshold_pass():
    classes, confidence = np.array([0, 0, 1, 1]), np.float32([0.95, 0.5, 0.3, 0.2])
    used = select(classes, confidence, PseudoLabels(threshold=0.9, adaptive=True))
    assert used.tolist() == [True, False, True, True]


def test_a_threshold_of_zero_cannot_be_adapted():
    with pytest.raises(UserError, match=r"adaptive = True needs a threshold above 0"):
        PseudoLabels(adaptive=True)


# --- agreement -----------------------------------------------------------------------------------


def test_so_many_teachers_must_agree_before_thresholds_and_numbers_count():
    agreement = np.float32([1 / 3, 1, 1, 1, 2 / 3, 1])
    settings = PseudoLabels(min_agreement=2 / 3, per_class=1)
    used = select(CLASSES, CONFIDENCE, settings, agreement)
    assert used.tolist() == [False, False, True, True, True, False]
    assert select(CLASSES, CONFIDENCE, PseudoLabels(min_agreement=1), agreement).sum() == 4


def test_agreement_that_was_not_noted_is_asked_for_in_vain():
    with pytest.raises(UserError, match=r"pseudo_labels.min_agreement = 0.5: .*write them again"):
        select(CLASSES, CONFIDENCE, PseudoLabels(min_agreement=0.5))


# --- stores --------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> StoredLabels:
    """Images 0, 10, 20, … of CLASSES with CONFIDENCE, of four classes."""
    said = np.repeat((1 - CONFIDENCE[:, None]) / 3, 4, axis=1)
    said[range(6), CLASSES] = CONFIDENCE
    write(tmp_path, 10 * np.arange(6), said, k=4)
    return read(tmp_path)


def chosen(stored: StoredLabels, ids: list[int], **settings) -> list[int]:
    return choose(stored, np.array(ids), PseudoLabels(**settings)).tolist()


def test_images_are_chosen_among_those_that_are_asked_for(stored):
    assert chosen(stored, [0, 10, 30, 50]) == [0, 10, 30, 50]
    assert chosen(stored, [0, 10, 30, 50], threshold=0.6) == [0, 50]
    # The image 0, which is surer of the class, is not among them.
    assert chosen(stored, [20, 40, 50], per_class=1) == [20, 40]
    assert chosen(stored, [], threshold=0.9) == []


def test_a_threshold_that_leaves_no_image_is_an_error_with_the_highest_confidence(stored):
    settings = PseudoLabels(threshold=0.75, min_agreement=1)
    ids = np.array([10, 20, 30])
    used = choose(stored, ids, settings)
    assert len(used) == 0
    with pytest.raises(UserError) as raised:
        check_choice(stored, ids, used, settings)
    check_choice(stored, ids[:0], used, settings)
    check_choice(stored, ids, ids[:1], settings)
    assert str(raised.value) == (
        "pseudo_labels.threshold = 0.75 with pseudo_labels.min_agreement = 1 leaves none of 3 "
        "images without labels: the highest confidence is 0.7; lower it"
    )


def test_a_class_that_a_threshold_empties_is_named_and_one_that_is_never_predicted(stored):
    names, ids = ["cat", "dog", "cow", "owl"], stored.ids
    settings = PseudoLabels(threshold=0.6)
    found = unused_classes(stored, ids, choose(stored, ids, settings), settings, names)
    assert found == (
        "pseudo_labels.threshold = 0.6 leaves no image of 'cow' (1 predicted); the teachers "
        "predict 'owl' for no image without a label"
    )
    assert unused_classes(stored, ids[:4], ids[:4], PseudoLabels(), names[:3]) is None


def test_of_many_classes_ten_are_named(stored):
    names = [f"c{number}" for number in range(30)]
    found = unused_classes(stored, stored.ids, stored.ids, PseudoLabels(), names)
    assert found.endswith("'c11', 'c12' and 17 more classes for no image without a label")
