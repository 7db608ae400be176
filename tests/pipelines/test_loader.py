import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from grouped_settings import grouped
from pictures import colour_of, smooth_picture, write_plain

from pipelines.index import DataIndex
from pipelines.loader import EvalLoader, TrainLoader
from pipelines.sources.folder import index_folder
from sbf_dist.errors import UserError
from sbf_dist.settings import Augmentation

ALL = ("labelled", "unlabelled")
LIVELY = Augmentation(rotate=15, shift=0.1, color=0.2)
COMMON = {
    "batch_size": 4,
    "image_size": 8,
    "mean": (0.0, 0.0, 0.0),
    "std": (1 / 255, 1 / 255, 1 / 255),
    "rank": 0,
    "world_size": 1,
    "threads": 1,
}


def training(index: DataIndex, parts=ALL, **arguments) -> TrainLoader:
    return TrainLoader(
        index,
        parts,
        **grouped(**(COMMON | {"augmentation": Augmentation(), "seed": 1} | arguments)),
    )


def evaluation(index: DataIndex, part: str = "validation", **arguments) -> EvalLoader:
    return EvalLoader(index, part, **grouped(**(COMMON | arguments)))


def take(loader: TrainLoader, batches: int) -> list[dict[str, torch.Tensor]]:
    return [next(loader) for _ in range(batches)]


def ids_in(batches) -> list[int]:
    return [int(i) for batch in batches for i in batch["id"]]


def file_numbers(index: DataIndex) -> list[int]:
    """The number that colours each file: the order in which the fixture wrote them."""
    start = {"ant": 0, "bee": 9, "cow": 17}
    return [start[Path(name).parent.name] + int(Path(name).stem) for name in index.files]


def assert_pixels_belong_to_ids(index: DataIndex, batches) -> None:
    numbers = file_numbers(index)
    for batch in batches:
        for image, sample in zip(batch["image"], batch["id"], strict=True):
            expected = torch.tensor(colour_of(numbers[int(sample)]), dtype=torch.float32)
            assert (image - expected[:, None, None]).abs().max() <= 1


def equal(a, b) -> bool:
    return all(
        torch.equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in ("image", "id")
    )


def test_a_batch_has_the_promised_shapes_types_and_memory_format(plain_index):
    batch = next(training(plain_index))
    assert batch["image"].shape == (4, 3, 8, 8)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    for name in ("label", "id"):
        assert batch[name].shape == (4,)
        assert batch[name].dtype == torch.int64


def test_images_belong_to_their_ids_over_epoch_borders(plain_index):
    batches = take(training(plain_index, prefetch=3), 12)
    assert_pixels_belong_to_ids(plain_index, batches)
    ids = ids_in(batches)
    pool = sorted([*plain_index.parts["labelled"], *plain_index.parts["unlabelled"]])
    assert sorted(ids[: len(pool)]) == pool
    assert sorted(ids[len(pool) : 2 * len(pool)]) == pool


def test_unlabelled_samples_do_not_show_their_class(plain_index):
    labelled = set(plain_index.parts["labelled"].tolist())
    for batch in take(training(plain_index), 10):
        for label, sample in zip(batch["label"].tolist(), batch["id"].tolist(), strict=True):
            assert label == (plain_index.labels[sample] if sample in labelled else -1)


def test_one_part_alone_gives_only_its_samples(plain_index):
    batches = take(training(plain_index, ["labelled"]), 6)
    assert set(ids_in(batches)) == set(plain_index.parts["labelled"].tolist())
    assert all((batch["label"] >= 0).all() for batch in batches)


def test_batches_that_are_kept_do_not_change_while_others_are_made(plain_index):
    loader = training(plain_index, augmentation=LIVELY)
    kept = take(loader, 6)
    copies = [{key: value.clone() for key, value in batch.items()} for batch in kept]
    take(loader, 20)
    assert equal(kept, copies)


def test_the_same_seed_gives_the_same_batches_whatever_threads_and_prefetch(plain_index):
    first = take(training(plain_index, augmentation=LIVELY), 8)
    again = take(training(plain_index, augmentation=LIVELY, threads=2, prefetch=4), 8)
    other = take(training(plain_index, augmentation=LIVELY, seed=2), 8)
    assert equal(first, again)
    assert not equal(first, other)


def test_a_resumed_loader_goes_on_with_the_very_same_batches(plain_index):
    uninterrupted = take(training(plain_index, augmentation=LIVELY), 12)
    loader = training(plain_index, augmentation=LIVELY)
    take(loader, 5)
    state = loader.state_dict()
    resumed = training(plain_index, augmentation=LIVELY)
    resumed.load_state_dict(state)
    assert equal(take(resumed, 7), uninterrupted[5:])


def test_the_state_counts_what_was_handed_out_and_not_what_is_prefetched(plain_index):
    loader = training(plain_index, prefetch=4)
    assert loader.state_dict()["position"] == loader.state_dict()["epoch"] == 0
    take(loader, 3)
    assert loader.samples_seen == loader.state_dict()["position"] == 12
    take(loader, 2)
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 1)


def test_a_loader_can_be_set_back_while_batches_are_in_flight(plain_index):
    loader = training(plain_index)
    state = loader.state_dict()
    first = take(loader, 4)
    loader.load_state_dict(state)
    assert equal(take(loader, 4), first)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_ranks_goes_on_with_the_samples_not_yet_seen(plain_index, before, after):
    def ranks(count: int) -> list[TrainLoader]:
        return [
            training(plain_index, augmentation=LIVELY, rank=rank, world_size=count)
            for rank in range(count)
        ]

    def global_batches(loaders: list[TrainLoader], steps: int) -> list[dict[str, torch.Tensor]]:
        return [next(loader) for _ in range(steps) for loader in loaders]

    old = ranks(before)
    done = global_batches(old, 2)
    states = [loader.state_dict() for loader in old]
    assert all(state == states[0] for state in states)
    new = ranks(after)
    for loader in new:
        loader.load_state_dict(states[0])
    seen = done + global_batches(new, 3)
    # One rank that was never stopped sees the same samples in the same views.
    assert equal(seen, take(training(plain_index, augmentation=LIVELY), len(seen)))


def test_a_state_of_other_data_seed_or_parts_is_refused(plain_root, plain_index):
    state = training(plain_index).state_dict()
    with pytest.raises(UserError, match="state is of seed 1, this run has 2"):
        training(plain_index, seed=2).load_state_dict(state)
    with pytest.raises(UserError, match=r"state is of parts \['labelled', 'unlabelled'\]"):
        training(plain_index, ["labelled"]).load_state_dict(state)
    other = index_folder(plain_root, labelled_per_class=3, validation=4, seed=3)
    with pytest.raises(UserError, match=f"state is of data {plain_index.digest}"):
        training(other).load_state_dict(state)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_gives_every_sample_once_over_the_ranks(plain_index, world_size):
    part = plain_index.parts["unlabelled"]  # 13 samples
    ids = []
    for rank in range(world_size):
        loader = evaluation(plain_index, "unlabelled", rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert loader.samples == len(ids_in(batches))
        assert_pixels_belong_to_ids(plain_index, batches)
        for batch in batches:
            assert np.array_equal(batch["label"], plain_index.labels[batch["id"].numpy()])
        ids += ids_in(batches)
    assert sorted(ids) == part.tolist()


def test_evaluation_can_be_repeated_and_left_early(plain_index):
    loader = evaluation(plain_index, "unlabelled")
    first = list(loader)
    next(iter(loader))
    assert equal(list(loader), first)
    assert [len(batch["id"]) for batch in first] == [4, 4, 4, 1]


def test_a_rank_without_samples_evaluates_nothing(plain_index):
    loader = evaluation(plain_index, rank=5, world_size=6)  # 4 samples in all
    assert len(loader) == 0
    assert list(loader) == []


def test_several_loaders_work_side_by_side(plain_index):
    loaders = [training(plain_index, seed=seed) for seed in range(3)]
    checks = evaluation(plain_index, "unlabelled")
    alone = [take(training(plain_index, seed=seed), 4) for seed in range(3)]
    together: list[list] = [[], [], []]
    for _ in range(4):
        for loader, batches in zip(loaders, together, strict=True):
            batches.append(next(loader))
        assert len(ids_in(checks)) == 13
    assert all(equal(a, b) for a, b in zip(alone, together, strict=True))
    for loader in loaders:
        loader.close()


@pytest.fixture
def movable_index(tmp_path: Path) -> DataIndex:
    for k in range(10):
        write_plain(tmp_path / "data" / "a" / f"{k}.png", k)
    return index_folder(tmp_path / "data", labelled_per_class=None, validation=2, seed=0)


def test_a_file_that_vanishes_is_named_and_its_return_mends_the_loader(movable_index):
    loader = training(movable_index)
    whole = take(training(movable_index), 8)
    take(loader, 1)
    folder = movable_index.root / "a"
    shutil.move(folder, folder.with_name("gone"))
    with pytest.raises(UserError, match=r"image .*a/\d\.png: was removed after it was indexed"):
        take(loader, 8)
    shutil.move(folder.with_name("gone"), folder)
    seen = loader.samples_seen // 4
    assert equal(take(loader, 8 - seen), whole[seen:])
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="was removed after"):
        list(evaluation(movable_index))


@pytest.mark.parametrize("damage", [b"", b"no image"])
def test_a_file_that_was_damaged_after_indexing_is_named(movable_index, damage):
    for sample in movable_index.parts["validation"]:
        (movable_index.root / movable_index.files[sample]).write_bytes(damage)
    with pytest.raises(UserError, match=r"a/\d\.png: changed since it was indexed: not a readable"):
        list(evaluation(movable_index))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": ["validation"]}, "'validation' is for evaluation"),
        ({"parts": ["labeled"]}, "part 'labeled': there is labelled, unlabelled, validation"),
        ({"parts": []}, r"parts \[\]: .* has no such image"),
        ({"batch_size": 0}, "batch_size 0: must be at least 1"),
        ({"threads": 0}, "threads 0: must be at least 1"),
        ({"prefetch": 0}, "prefetch 0: must be at least 1"),
        ({"seed": -1}, "seed -1: must be 0 <= seed"),
    ],
)
def test_settings_out_of_range_are_named(plain_index, arguments, message):
    with pytest.raises(UserError, match=message):
        training(plain_index, **arguments)


def test_an_evaluation_crop_out_of_range_is_named(plain_index):
    with pytest.raises(UserError, match=r"crop 1.5: must be in \(0, 1\]"):
        evaluation(plain_index, crop=1.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what a GPU would give")
def test_a_device_that_is_not_there_is_named(plain_index):
    with pytest.raises(UserError, match="device cuda: must be cpu, or cuda where"):
        next(training(plain_index, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_what_the_cpu_gives(tmp_path):
    for k in range(12):
        (tmp_path / "a").mkdir(exist_ok=True)
        smooth_picture(120 + k, 90).save(tmp_path / "a" / f"{k}.jpg", quality=95)
    index = index_folder(tmp_path, labelled_per_class=None, validation=4, seed=0)
    for make in (lambda d: take(training(index, image_size=32, augmentation=LIVELY, device=d), 4),
                 lambda d: list(evaluation(index, image_size=32, device=d))):  # fmt: skip
        for ours, theirs in zip(make("cpu"), make("cuda"), strict=True):
            assert theirs["image"].is_cuda
            assert theirs["image"].is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(ours["id"], theirs["id"].cpu())
            assert (ours["image"] - theirs["image"].cpu()).abs().mean() < 2
