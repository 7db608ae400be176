import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.augmentation import draw_views
from sbf_dist.settings import Augmentation

FIELDS = ("anchor", "shape", "mirror", "matrix", "color")
LIVELY = Augmentation(rotate=20, shift=0.1, color=0.3)


def sizes_of(*pairs: tuple[int, int]) -> np.ndarray:
    return np.array(pairs, dtype=np.int64)


def test_a_view_depends_on_seed_and_position_alone():
    sizes = sizes_of(*[(50 + k, 80 - k) for k in range(12)])
    whole = draw_views(LIVELY, sizes, image_size=24, seed=5, position=100)
    for start, stop in ((0, 1), (3, 8), (11, 12)):
        part = draw_views(LIVELY, sizes[start:stop], image_size=24, seed=5, position=100 + start)
        for name in FIELDS:
            assert np.array_equal(getattr(part, name), getattr(whole, name)[start:stop]), name
    other = draw_views(LIVELY, sizes, image_size=24, seed=6, position=100)
    assert not np.array_equal(other.anchor, whole.anchor)


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    low=st.floats(0.01, 1),
    high=st.floats(0.01, 1),
    position=st.integers(0, 2**70),
)
def test_crops_lie_inside_the_image(height, width, low, high, position):
    augmentation = Augmentation(min_scale=min(low, high), max_scale=max(low, high))
    views = draw_views(
        augmentation, sizes_of((height, width)), image_size=24, seed=0, position=position
    )
    assert (views.anchor >= 0).all()
    assert (views.shape > 0).all()
    assert (views.anchor + views.shape <= 1 + 1e-6).all()


def test_area_and_ratio_of_crops_are_those_asked_for():
    augmentation = Augmentation(min_scale=0.2, max_scale=0.5, min_ratio=0.8, max_ratio=1.25)
    sizes = np.tile(sizes_of((375, 500)), (4000, 1))
    shape = draw_views(augmentation, sizes, image_size=24, seed=1, position=0).shape
    area = shape.prod(axis=1)
    ratio = shape[:, 1] * 500 / (shape[:, 0] * 375)
    assert 0.2 - 1e-5 <= area.min() < 0.21
    assert 0.49 < area.max() <= 0.5 + 1e-5
    assert abs(area.mean() - 0.35) < 0.01
    assert 0.8 - 1e-4 <= ratio.min() < 0.81
    assert 1.24 < ratio.max() <= 1.25 + 1e-4
    assert abs(np.log(ratio).mean()) < 0.01


def test_an_image_too_long_for_the_ratio_gives_its_largest_crop_of_the_nearest_ratio():
    augmentation = Augmentation(min_scale=1, max_scale=1)
    views = draw_views(augmentation, sizes_of((100, 1000)), image_size=24, seed=0, position=0)
    assert views.shape[0].tolist() == pytest.approx([1.0, 100 * 4 / 3 / 1000], rel=1e-5)


def test_half_of_the_views_are_mirrored_and_none_without_flip():
    sizes = np.tile(sizes_of((32, 32)), (2000, 1))
    mirrored = draw_views(Augmentation(), sizes, image_size=24, seed=0, position=0).mirror
    assert 900 < mirrored.sum() < 1100
    still = draw_views(Augmentation(flip=False), sizes, image_size=24, seed=0, position=0).mirror
    assert still.sum() == 0


def test_without_rotation_and_shift_the_matrix_is_the_identity():
    views = draw_views(Augmentation(), sizes_of((32, 32)), image_size=24, seed=0, position=0)
    assert np.allclose(views.matrix[0], [[1, 0, 0], [0, 1, 0]])


def test_rotation_keeps_the_centre_where_it_is():
    views = draw_views(
        Augmentation(rotate=90),
        np.tile(sizes_of((9, 9)), (50, 1)),
        image_size=24,
        seed=0,
        position=0,
    )
    assert np.allclose(views.matrix @ np.array([12, 12, 1]), [12, 12], atol=1e-4)
    assert np.abs(np.arccos(views.matrix[:, 0, 0])).max() <= np.pi / 2
