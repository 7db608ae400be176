"""An epoch that is interrupted gives every sample once, whatever the numbers of ranks."""

from collections import Counter

import numpy as np
import pytest
import torch

from pipelines.index import DataIndex
from pipelines.joined import JoinedLoader
from pipelines.loader import TrainLoader
from pipelines.reader import Reader
from sbf_dist.errors import UserError
from sbf_dist.settings import Augmentation, View

RANKS = [(1, 1), (2, 2), (2, 1), (1, 3), (3, 2)]
LIVELY = Augmentation(rotate=10, color=0.2)


def ranks(
    index: DataIndex, parts: list[str], batch_size: int, count: int, **arguments
) -> list[TrainLoader]:
    return [
        TrainLoader(
            index,
            parts,
            Reader(rank, count, cache=arguments.get("cache", "none")),
            batch_size=batch_size,
            view=View(image_size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
            augmentation=arguments.get("augmentation", LIVELY),
            seed=4,
        )
        for rank in range(count)
    ]


def steps(loaders, count: int) -> list[dict[str, torch.Tensor]]:
    """`count` steps of all ranks, in the order of the stream."""
    return [next(loader) for _ in range(count) for loader in loaders]


def ids_in(batches) -> list[int]:
    return [int(i) for batch in batches for i in batch["id"]]


@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize(("before", "after"), RANKS)
def test_an_interrupted_epoch_gives_the_samples_of_an_uninterrupted_one(
    plain_index, before, after, cache
):
    # 19 samples, of which neither 3 nor 6 nor 9 is a divisor: batches run over the epoch's border.
    old = ranks(plain_index, ["labelled", "unlabelled"], 3, before, cache=cache)
    size = old[0].samples_per_epoch
    assert size == 19
    first = steps(old, 2)
    states = [loader.state_dict() for loader in old]
    assert all(state == states[0] for state in states)
    new = ranks(plain_index, ["labelled", "unlabelled"], 3, after, cache=cache)
    for loader in new:
        loader.load_state_dict(states[0])
    rest = steps(new, -(-(3 * size - 6 * before) // (3 * after)))
    seen = ids_in(first + rest)
    whole = ids_in(steps(ranks(plain_index, ["labelled", "unlabelled"], 1, 1), 3 * size))
    for epoch in range(3):
        part = slice(epoch * size, (epoch + 1) * size)
        assert Counter(seen[part]) == Counter(whole[part]) == Counter(set(whole))
    assert seen[: 3 * size] == whole  # in the same order, too


def test_a_batch_larger_than_the_epoch_gives_each_sample_as_often(plain_index):
    (loader,) = ranks(plain_index, ["labelled"], 20, 1)  # 6 samples
    assert Counter(ids_in(steps([loader], 3))) == dict.fromkeys(
        plain_index.parts["labelled"].tolist(), 10
    )
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (10, 0)


@pytest.mark.parametrize(("before", "after"), RANKS)
def test_interrupted_joined_streams_give_the_samples_of_both_streams_once(
    plain_index, before, after
):
    sizes = {"labelled": 1, "unlabelled": 3}

    def joined(count: int) -> list[JoinedLoader]:
        streams = {part: ranks(plain_index, [part], size, count) for part, size in sizes.items()}
        return [JoinedLoader([streams[part][rank] for part in sizes]) for rank in range(count)]

    old = joined(before)
    batches = steps(old, 2)
    states = [loader.state_dict() for loader in old]
    assert all(state == states[0] for state in states)
    new = joined(after)
    for loader in new:
        loader.load_state_dict(states[0])
    batches += steps(new, 9)
    places = {"labelled": slice(0, 1), "unlabelled": slice(1, 4)}
    for part, place in places.items():
        seen = [int(i) for batch in batches for i in batch["id"][place]]
        pool = plain_index.parts[part].tolist()
        for epoch in range(len(seen) // len(pool)):
            assert sorted(seen[epoch * len(pool) : (epoch + 1) * len(pool)]) == pool
        (alone,) = ranks(plain_index, [part], 1, 1)
        pictures = torch.cat([batch["image"][place] for batch in batches])
        assert torch.equal(pictures, torch.cat([b["image"] for b in steps([alone], len(seen))]))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 3)])
def test_mixup_pairs_are_those_of_the_stream_whatever_the_ranks_and_batches(
    plain_index, before, after
):
    augmentation = Augmentation(mixup=0.8, cutmix=1.0)

    def make(count: int, batch_size: int) -> list[TrainLoader]:
        parts = ["labelled", "unlabelled"]
        return ranks(plain_index, parts, batch_size, count, augmentation=augmentation)

    old = make(before, 2)
    batches = steps(old, 3)
    new = make(after, 4)
    for loader in new:
        loader.load_state_dict(old[0].state_dict())
    batches += steps(new, 2)

    def pairs(batches) -> list[tuple]:
        return [
            (int(b["id"][k]), int(b["id"][b["mixup_partner"][k]]), float(b["mixup_share"][k]),
             *b["mixup_box"][k].tolist())
            for b in batches for k in range(len(b["id"]))
        ]  # fmt: skip

    count = len(pairs(batches))
    assert pairs(batches) == pairs(steps(make(1, 2), count // 2))


def test_a_pair_needs_a_batch_of_even_size(plain_index):
    with pytest.raises(UserError, match=r"batch_size 3 of one worker: .* must be even"):
        ranks(plain_index, ["labelled"], 3, 1, augmentation=Augmentation(mixup=0.2))


def test_the_partners_in_joined_batches_are_images_of_the_same_stream(plain_index):
    parts = {"labelled": 2, "unlabelled": 4}
    joined = JoinedLoader(
        [
            ranks(plain_index, [part], size, 1, augmentation=Augmentation(mixup=0.2))[0]
            for part, size in parts.items()
        ]
    )
    for batch in steps([joined], 3):
        assert batch["mixup_partner"].tolist() == [1, 0, 3, 2, 5, 4]
        assert torch.equal(batch["label"] >= 0, batch["label"][batch["mixup_partner"]] >= 0)


def test_the_order_is_a_permutation_drawn_by_the_seed(plain_index):
    (one,) = ranks(plain_index, ["labelled", "unlabelled"], 19, 1)
    epochs = [batch["id"].numpy() for batch in steps([one], 3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.sort(epochs[0]))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], np.sort(epochs[0]))


def test_exactly_at_the_end_of_an_epoch_the_next_one_begins_and_none_is_skipped(plain_index):
    old = ranks(plain_index, ["labelled"], 3, 1)  # 6 samples: two steps
    first = ids_in(steps(old, 2))
    state = old[0].state_dict()
    assert (state["epoch"], state["position"]) == (1, 0)
    new = ranks(plain_index, ["labelled"], 1, 2)
    for loader in new:
        loader.load_state_dict(state)
    rest = ids_in(steps(new, 6))
    assert first + rest == ids_in(steps(ranks(plain_index, ["labelled"], 1, 1), 18))
    assert sorted(first) == sorted(rest[:6]) == sorted(rest[6:])


def test_sixteen_to_eight_to_sixteen_workers_see_one_stream(plain_index):
    """The batch of all workers stays; each number of workers goes on from the one before."""
    seen: list[int] = []
    state = None
    for count, batch_size, number in ((16, 1, 3), (8, 2, 2), (16, 1, 2)):
        loaders = ranks(plain_index, ["labelled", "unlabelled"], batch_size, count)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        seen += ids_in(steps(loaders, number))
        states = [loader.state_dict() | {"world_size": 0} for loader in loaders]
        assert all(own == states[0] for own in states)
        state = loaders[0].state_dict()
    (alone,) = ranks(plain_index, ["labelled", "unlabelled"], 1, 1)
    assert seen == ids_in(steps([alone], 7 * 16))
