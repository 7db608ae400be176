"""Calibration images as a stream."""

import gc
import re

import pytest
import torch
from batch_streams import Stream
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import pictures

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.inputs import Packing
from sbf_dist.errors import UserError


def test_a_tensor_comes_in_batches_and_the_same_ones_each_time():
    images = pictures(10)
    calibration = Calibration.of(images, batch=4)
    assert [len(batch) for batch in calibration] == [4, 3, 3]
    for _ in range(2):
        assert torch.equal(torch.cat(list(calibration)), images)
    assert calibration.count == 10
    assert calibration.shape == (3, 10, 10)


def test_an_iterable_of_batches_is_gone_through_again_and_again():
    calibration = Calibration.of(Stream([2, 3, 1]))
    assert (calibration.count, calibration.shape) == (6, (3, 4, 4))
    for _ in range(2):
        assert [len(batch) for batch in calibration] == [2, 3, 1]


@pytest.mark.parametrize(
    ("most", "first", "sizes"),
    [
        (2, None, [2, 2, 2]),
        (1, None, [2, 2, 2]),
        (4, None, [3, 3]),
        (9, None, [6]),
        (2, 4, [2, 2]),
        (2, 3, [2, 2]),
        (9, 99, [6]),
    ],
)
def test_parts_are_cut_across_the_batches(most, first, sizes):
    images = torch.arange(6.0)[:, None, None, None].expand(-1, 3, 4, 4)
    calibration = Calibration.of([images[:2], images[2:5], images[5:]])
    parts = list(calibration.parts(most, first))
    assert [len(part) for part in parts] == sizes
    assert torch.cat(parts)[:, 0, 0, 0].tolist() == list(range(sum(sizes)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 12))
def test_no_part_has_a_single_image_and_all_are_of_about_one_size(batches, most):
    images = torch.arange(float(sum(batches)))[:, None, None, None].expand(-1, 1, 2, 2)
    calibration = Calibration.of(images.split(batches))
    sizes = [len(part) for part in calibration.parts(most)]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 1 or len(images) == 1
    assert max(sizes) <= max(most, 3)
    assert torch.equal(torch.cat(list(calibration.parts(most))), images)


def test_parts_of_the_first_images_ask_for_no_more_batches_than_these_need():
    stream = Stream([2] * 50)
    calibration = Calibration.of(stream)
    stream.made = 0
    list(calibration.parts(2, 4))
    assert stream.made == 2


def test_first_is_a_copy_of_what_a_loader_may_write_to_again():
    buffer = torch.zeros(2, 3, 4, 4)

    class Reused:
        def __iter__(self):
            for value in range(3):
                yield buffer.fill_(value)

    first = Calibration.of(Reused()).first(5)
    assert first[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("batches", [3, 30])
def test_what_is_held_does_not_grow_with_the_number_of_batches(batches):
    stream = Stream([4] * batches)
    calibration = Calibration.of(stream)
    for _ in calibration:
        pass
    for _ in calibration.parts(2):
        pass
    gc.collect()
    assert stream.made == 3 * batches
    assert stream.most <= 2


def test_batches_come_on_the_device_that_is_asked_for():
    calibration = Calibration.of(pictures(4), device="meta")
    assert next(iter(calibration)).device.type == "meta"
    again = Calibration.of(calibration, device="cpu")
    assert next(iter(again)).device.type == "cpu"
    assert again.first(2).device.type == "cpu"
    assert next(iter(calibration)).device.type == "meta"


def test_batches_are_smaller_where_images_are_large():
    assert Calibration.of(pictures(2)).part == 64
    assert Calibration.of(torch.zeros(1, 3, 224, 224)).part == 10
    assert Calibration.of(torch.zeros(1, 1, 2000, 2000)).part == 2


class Shrinking:
    """A loader that gives less each time."""

    def __init__(self):
        self.times = 0

    def __iter__(self):
        self.times += 1
        return iter([pictures(4)] * (4 - self.times))


def test_fewer_images_the_second_time_are_refused():
    calibration = Calibration.of(Shrinking())
    with pytest.raises(UserError, match="12 came at first, 8 now"):
        list(calibration)


def test_images_in_another_order_are_refused():
    loader = torch.utils.data.DataLoader(pictures(32), batch_size=8, shuffle=True)
    calibration = Calibration.of(loader)
    with pytest.raises(UserError, match="came in another order; give shuffle=False"):
        list(calibration)


@pytest.mark.parametrize(("size", "inner"), [(40, 8), (64, 16), (7, 1)])
def test_another_order_is_seen_wherever_the_images_differ(size, inner):
    images = torch.zeros(32, 3, size, size)
    start = (size - inner) // 2
    place = slice(start, start + inner)
    images[:, :, place, place] = pictures(32, inner)
    loader = torch.utils.data.DataLoader(images, batch_size=8, shuffle=True)
    with pytest.raises(UserError, match="came in another order; give shuffle=False"):
        list(Calibration.of(loader))
    assert torch.equal(torch.cat(list(Calibration.of(images))), images)


def test_another_order_of_packed_inputs_is_seen_wherever_they_differ():
    scores = torch.zeros(16, 1000)
    scores[:, 5:9] = 10 * torch.arange(16)[:, None]
    pairs = [(pictures(16, 1), scores), (pictures(16, 1), scores.flip(0))]

    class Turning:
        def __iter__(self):
            yield pairs[0]
            pairs.reverse()

    calibration = Calibration.of(Turning(), packing=Packing.of(pairs[0]))
    with pytest.raises(UserError, match="image 0 is not the same"):
        list(calibration)


def test_images_that_are_augmented_anew_are_refused():
    class Augmented:
        def __iter__(self):
            yield pictures(4)
            yield pictures(4) + torch.rand(4, 1, 1, 1)

    calibration = Calibration.of(Augmented())
    assert torch.equal(calibration.first(4), pictures(4))
    with pytest.raises(UserError, match="image 4 is not the same in each iteration"):
        list(calibration.parts(3))


def test_the_same_images_in_other_batches_are_the_same_images():
    class Rebatched:
        def __init__(self):
            self.size = 2

        def __iter__(self):
            self.size += 1
            return iter(pictures(12).split(self.size))

    calibration = Calibration.of(Rebatched())
    assert torch.equal(torch.cat(list(calibration)), pictures(12))


def test_images_come_in_the_type_that_is_asked_for():
    calibration = Calibration.of(pictures(4), dtype=torch.float64)
    assert calibration.first(2).dtype == next(iter(calibration)).dtype == torch.float64
    assert calibration.to(dtype=torch.float16).first(2).dtype == torch.float16
    # Of integers it is for others to say that they are no normalised images.
    assert Calibration.of(pictures(4).byte(), dtype=torch.float64).first(2).dtype == torch.uint8


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (iter([pictures(2)]), "can be iterated only once"),
        ([], "no image is given"),
        (pictures(2)[:0], "no image is given"),
        ([pictures(2), pictures(2, 8)], "a batch of (2, 3, 8, 8) came where the first images"),
        ([pictures(2)[0]], "a batch is (3, 10, 10), it must be a tensor (N, C, H, W)"),
        ([{"image": pictures(2)}], "a batch is dict, it must be a tensor"),
    ],
)
def test_what_is_no_stream_of_images_is_refused_in_one_line(images, told):
    with pytest.raises(UserError, match=re.escape(told)) as error:
        Calibration.of(images)
    assert "\n" not in str(error.value)


def test_labels_behind_the_images_are_left_out():
    images = pictures(6)
    pairs = [(images[:4], torch.zeros(4)), [images[4:], torch.zeros(2)]]
    assert torch.equal(torch.cat(list(Calibration.of(pairs))), images)


class Changing:
    """Batches of which one is another each time."""

    def __init__(self, change):
        self.images, self.change = pictures(6), change

    def __iter__(self):
        self.images = self.images.clone()
        self.images[3:] = self.change(self.images[3:])
        return iter(self.images.split(3))


@pytest.mark.parametrize("change", [lambda x: x.flip(3), lambda x: x.roll(1, 0), lambda x: 2 * x])
def test_an_iteration_that_gives_other_images_is_refused(change):
    calibration = Calibration.of(Changing(change))
    with pytest.raises(UserError, match=r"came in another order|is not the same in each iteration"):
        calibration.first(6)


def test_images_that_are_decoded_with_a_little_noise_are_the_same():
    noisy = Changing(lambda x: x + 1e-3 * torch.rand(x.shape))
    assert len(torch.cat(list(Calibration.of(noisy)))) == 6
