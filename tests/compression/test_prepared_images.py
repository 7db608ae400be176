"""Calibration images in an order of which any first images are of all places."""

import pytest
import torch
from batch_streams import Stream
from hypothesis import given
from hypothesis import strategies as st
from small_networks import pictures, small

from sbf_dist.compression import held_images
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.holding_out import split
from sbf_dist.compression.prepared_images import calibration_for, spread
from sbf_dist.errors import UserError


def numbered(count, batch=7, **more):
    images = torch.arange(count, dtype=torch.float)[:, None, None, None].expand(-1, 1, 2, 2)
    return Calibration(images.split(batch), **more)


def numbers(images):
    return [int(one) for batch in images for one in batch[:, 0, 0, 0]]


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 12))
def test_the_first_images_are_taken_evenly_from_all(count, first, places):
    order = numbers(spread(numbered(count)))
    assert sorted(order) == list(range(count))
    first = min(first, count)
    found = [
        sum(number * places // count == place for number in order[:first])
        for place in range(places)
    ]
    most = -(-count // places)
    assert all(abs(one - first / places) <= 2.5 or one == most for one in found)


def test_classes_in_a_row_are_in_every_batch():
    order = numbers(spread(numbered(512, sources=[index // 64 for index in range(512)])))
    for start in range(0, 512, 16):
        assert {number // 64 for number in order[start : start + 16]} == set(range(8))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.booleans())
def test_every_image_keeps_its_source(sizes, named):
    count = sum(sizes)
    sources = [index // 3 for index in range(count)] if named else None
    images = spread(numbered(count, sources=sources))
    if named:
        assert images.sources == [number // 3 for number in numbers(images)]
    fit, held = split(images)
    if held is not None:
        of = dict(zip(numbers(images), images.sources, strict=True))
        assert not {of[n] for n in numbers(fit)} & {of[n] for n in numbers(held)}


def test_images_are_spread_once():
    images = spread(numbered(40))
    assert spread(images) is images
    for part in split(images):
        assert spread(part) is part


@pytest.mark.parametrize("memory", [0, 2**28])
def test_a_stream_is_read_once_more_and_kept(memory, monkeypatch):
    monkeypatch.setattr(held_images, "MEMORY", memory)
    stream = Stream([4] * 9)
    images = Calibration.of(stream)
    stream.made = 0
    kept = spread(images)
    assert stream.made == 9
    assert stream.most <= 2
    wanted = numbers(spread(Calibration.of(list(Stream([4] * 9)))))
    assert numbers(kept) == numbers(kept) == wanted
    assert stream.made == 9


def test_images_in_memory_are_not_copied():
    images = pictures(20)
    given = calibration_for(small(), images)
    before = numbers(given)
    images[:, 0, 0, 0] = 7
    assert numbers(given._batches) == [7] * 20 != before


def test_a_stream_in_another_order_is_refused():
    class Shuffled:
        def __iter__(self):
            yield from torch.randn(8, 4, 3, 6, 6)

    torch.manual_seed(0)
    with pytest.raises(UserError, match="image 0 is not the same in each iteration"):
        spread(Calibration.of(Shuffled()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("as_stream", [False, True])
def test_images_lie_as_they_did(layout, as_stream):
    batches = [x.contiguous(memory_format=layout) for x in torch.randn(4, 5, 3, 6, 7)]

    class Read:
        def __iter__(self):
            return iter(batches)

    for batch in spread(Calibration.of(Read() if as_stream else batches)):
        assert batch.is_contiguous(memory_format=layout)
