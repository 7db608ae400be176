import pytest
import torch

from pipelines.joined import JoinedLoader, LoadersInTurn
from pipelines.loader import TrainLoader
from pipelines.reader import Reader
from sbf_dist.errors import UserError
from sbf_dist.settings import Augmentation, View


def loader(index, part, batch_size, seed=0, rank=0, world_size=1):
    return TrainLoader(
        index,
        [part],
        Reader(rank, world_size),
        batch_size=batch_size,
        view=View(image_size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        augmentation=Augmentation(),
        seed=seed,
    )


@pytest.fixture
def joined(plain_index):
    loaders = []

    def make(labelled=2, unlabelled=5):
        streams = {"labelled": labelled, "unlabelled": unlabelled}
        loaders.append(
            JoinedLoader([loader(plain_index, part, n) for part, n in streams.items() if n])
        )
        return loaders[-1]

    yield make
    for one in loaders:
        one.close()


def test_a_batch_is_the_labelled_images_beside_the_unlabelled(joined, plain_index):
    batches = joined()
    for _ in range(3):
        batch = next(batches)
        assert batch["image"].shape == (7, 3, 8, 8)
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        ids, labels = batch["id"], batch["label"]
        assert set(ids[:2].tolist()) <= set(plain_index.parts["labelled"].tolist())
        assert set(ids[2:].tolist()) <= set(plain_index.parts["unlabelled"].tolist())
        assert labels[:2].tolist() == plain_index.labels[ids[:2]].tolist()
        assert labels[2:].tolist() == [-1] * 5


def test_it_gives_what_its_loaders_give(joined, plain_index):
    batches = joined()
    labelled = loader(plain_index, "labelled", 2)
    unlabelled = loader(plain_index, "unlabelled", 5)
    for _ in range(2):
        batch, one, other = next(batches), next(labelled), next(unlabelled)
        for key in ("image", "label", "id"):
            assert torch.equal(batch[key], torch.cat([one[key], other[key]]))
    labelled.close()
    unlabelled.close()


def test_a_single_loader_is_passed_through(joined):
    batch = next(joined(labelled=3, unlabelled=0))
    assert batch["id"].shape == (3,)
    assert (batch["label"] >= 0).all()


def test_it_is_an_endless_iterator(joined):
    batches = joined()
    assert iter(batches) is batches
    seen = [next(batches)["id"] for _ in range(12)]
    assert len(seen) == 12


def test_it_goes_on_where_its_state_was_taken(joined):
    batches = joined()
    for _ in range(3):
        next(batches)
    state = batches.state_dict()
    wanted = [{k: v.clone() for k, v in next(batches).items()} for _ in range(3)]
    again = joined()
    again.load_state_dict(state)
    for batch in wanted:
        other = next(again)
        assert all(torch.equal(value, other[key]) for key, value in batch.items())


def test_the_state_of_another_number_of_loaders_is_refused(joined):
    state = joined(labelled=3, unlabelled=0).state_dict()
    with pytest.raises(UserError, match="read 1 streams of images, now it reads 2"):
        joined().load_state_dict(state)


def test_the_state_of_other_images_is_refused(joined):
    one = joined()
    state = one.state_dict()
    state["streams"].reverse()
    with pytest.raises(UserError):
        joined().load_state_dict(state)


def test_nothing_to_join_is_our_own_bug():
    with pytest.raises(AssertionError, match="nothing to join"):
        JoinedLoader([])


def in_turn(joined):
    """Two batches of both parts, then labelled images alone."""
    return LoadersInTurn(joined(), joined(7, 0), samples=14, mark="alone")


def test_after_so_many_samples_come_the_batches_of_the_other_loader(joined):
    batches = in_turn(joined)
    found = [next(batches) for _ in range(4)]
    assert ["alone" in batch for batch in found] == [False, False, True, True]
    first, then = joined(), joined(7, 0)
    for batch in found[:2]:
        assert torch.equal(batch["image"], next(first)["image"])
    for batch in found[2:]:
        assert torch.equal(batch["image"], next(then)["image"])
        assert bool((batch["label"] >= 0).all())


def test_a_longer_training_goes_on_with_the_first_loader_until_its_step_of_change(joined):
    short = in_turn(joined)
    for _ in range(3):  # one of them with labelled images alone
        next(short)
    longer = LoadersInTurn(joined(), joined(7, 0), samples=35, mark="alone")
    longer.load_state_dict(short.state_dict())
    found = ["alone" in next(longer) for _ in range(3)]
    assert found == [False, False, True]  # 21 samples were given, 14 are left until the 35th


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_loaders_in_turn_go_on_where_their_state_was_taken(joined, cut):
    whole = in_turn(joined)
    for _ in range(cut):
        next(whole)
    resumed = in_turn(joined)
    resumed.load_state_dict(whole.state_dict())
    for _ in range(3):
        expected, found = next(whole), next(resumed)
        assert found.keys() == expected.keys()
        assert torch.equal(found["image"], expected["image"])
