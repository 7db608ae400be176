import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.order import SampleStream, evaluation_shard, rank_start


def ids_of(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64) * 3 + 1


def read(stream: SampleStream, position: int, batch_size: int, world_size: int) -> np.ndarray:
    """One global batch, put together from what the ranks read."""
    starts = [rank_start(position, batch_size, rank) for rank in range(world_size)]
    return np.concatenate([stream.take(start, batch_size) for start in starts])


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 5),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_sample_comes_once_per_epoch(count, batch_size, world_size, seed):
    stream = SampleStream(ids_of(count), seed)
    step = batch_size * world_size
    given_out = np.concatenate(
        [read(stream, k * step, batch_size, world_size) for k in range(3 * count // step + 2)]
    )
    for epoch in range(3):
        part = given_out[epoch * count : (epoch + 1) * count]
        assert sorted(part) == list(ids_of(count))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 6),
    worlds=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    seed=st.integers(0, 2**32),
)
def test_a_change_of_world_size_leaves_the_stream_as_it_was(count, batch_size, worlds, seed):
    position, pieces = 0, []
    for world_size in worlds:
        for _ in range(2):
            # A stream of its own each time, as after a restart.
            pieces.append(read(SampleStream(ids_of(count), seed), position, batch_size, world_size))
            position += batch_size * world_size
    whole = SampleStream(ids_of(count), seed).take(0, position)
    assert np.array_equal(np.concatenate(pieces), whole)


def test_epochs_differ_and_repeat_themselves_when_asked_again():
    stream = SampleStream(ids_of(50), 7)
    first, second = stream.epoch(0).copy(), stream.epoch(1).copy()
    stream.epoch(9)
    assert not np.array_equal(first, second)
    assert np.array_equal(stream.epoch(0), first)
    assert not np.array_equal(SampleStream(ids_of(50), 8).epoch(0), first)


def test_the_order_is_pinned_so_that_old_checkpoints_stay_valid():
    assert SampleStream(np.arange(8), 0).take(0, 10).tolist() == [5, 0, 6, 1, 7, 2, 4, 3, 2, 0]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 40), world_size=st.integers(1, 9))
def test_evaluation_shards_cover_every_sample_once(count, world_size):
    shards = [evaluation_shard(ids_of(count), rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shards)) == list(ids_of(count))
    lengths = [len(shard) for shard in shards]
    assert max(lengths) - min(lengths) <= 1
