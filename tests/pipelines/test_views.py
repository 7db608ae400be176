"""Padded crops, RandAugment and strong views: what they show, and that nothing but seed and
position decides it."""

import numpy as np
import pytest
import torch
from grouped_settings import grouped
from pictures import smooth_picture
from PIL import Image

from pipelines.augmentation import OPERATIONS, draw_views
from pipelines.graphs import Form, train_graph
from pipelines.index import DataIndex
from pipelines.joined import JoinedLoader
from pipelines.loader import TrainLoader
from pipelines.mixup import draw_mixup
from pipelines.sources.folder import index_folder
from sbf_dist.settings import Augmentation

SIDE = 24
PADDED = Augmentation(crop="padded", padding=3)
STRONG = Augmentation(crop="padded", rand_augment=2, magnitude=12, flip=False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> DataIndex:
    """Twelve files of 24 × 24 pixels that are all different."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "a").mkdir()
    for k in range(12):
        picture = smooth_picture(SIDE + 12, SIDE + 12).crop((k, 12 - k, SIDE + k, SIDE + 12 - k))
        picture.save(root / "a" / f"{k:02}.png")
    return index_folder(root, labelled_per_class=None, validation=2, seed=0)


def loader(index: DataIndex, **arguments) -> TrainLoader:
    settings = {
        "batch_size": 4,
        "image_size": SIDE,
        "mean": (0.0, 0.0, 0.0),
        "std": (1 / 255, 1 / 255, 1 / 255),
        "augmentation": PADDED,
        "seed": 7,
        "rank": 0,
        "world_size": 1,
        "threads": 1,
    }
    return TrainLoader(index, ["labelled"], **grouped(**(settings | arguments)))


def stream(batches, key: str = "image") -> torch.Tensor:
    return torch.cat([batch[key] for batch in batches])


def take(loader, count: int):
    return [next(loader) for _ in range(count)]


def picture_of(index: DataIndex, sample: int) -> np.ndarray:
    with Image.open(index.root / index.files[sample]) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32)


def test_a_padded_crop_is_cut_out_of_the_image_with_a_black_border(pictures):
    batch = next(loader(pictures, batch_size=20))
    ids = batch["id"].numpy()
    views = draw_views(PADDED, pictures.sizes[ids], image_size=SIDE, seed=7, position=0)
    assert set(views.mirror.tolist()) == {0, 1}
    for image, sample, start, mirror in zip(
        batch["image"], ids, views.start, views.mirror, strict=True
    ):
        padded = np.pad(picture_of(pictures, sample), ((3, 3), (3, 3), (0, 0)))
        top, left = start + 3
        expected = padded[top : top + SIDE, left : left + SIDE]
        shown = image.permute(1, 2, 0).numpy()
        assert np.array_equal(shown[:, ::-1] if mirror else shown, expected)


def test_padded_crops_reach_every_place_of_the_border_and_no_further():
    sizes = np.full((4000, 2), SIDE)
    start = draw_views(PADDED, sizes, image_size=SIDE, seed=0, position=0).start
    for axis in range(2):
        counts = np.bincount(start[:, axis] + 3, minlength=7)
        assert len(counts) == 7
        assert counts.min() > 4000 / 7 * 0.8
    tall = draw_views(PADDED, np.full((4000, 2), (48, 24)), image_size=SIDE, seed=0, position=0)
    assert (tall.start.min(axis=0) == [-3, -3]).all()
    assert (tall.start.max(axis=0) == [27, 3]).all()


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (24, 60)])
def test_an_image_of_another_size_is_resized_to_the_square_first(tmp_path, size):
    (tmp_path / "a").mkdir()
    for k in range(4):
        smooth_picture(*size).save(tmp_path / "a" / f"{k}.png")
    index = index_folder(tmp_path, labelled_per_class=None, validation=1, seed=0)
    plain = Augmentation(crop="padded", padding=0, flip=False)
    batch = next(loader(index, augmentation=plain, batch_size=8))
    start = draw_views(plain, index.sizes[batch["id"]], image_size=SIDE, seed=7, position=0).start
    scale = SIDE / min(size)
    whole = smooth_picture(*size).resize(
        (round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BILINEAR
    )
    for image, (top, left) in zip(batch["image"], start, strict=True):
        expected = np.asarray(whole.crop((left, top, left + SIDE, top + SIDE)), dtype=float)
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 3


def operated(picture: np.ndarray, name: str, magnitude: int, sign: int) -> np.ndarray:
    """One operation of RandAugment, on its own."""
    augmentation = Augmentation(crop="padded", padding=0, rand_augment=1, magnitude=magnitude)
    form = Form(1, SIDE, (0,) * 3, (1 / 255,) * 3, 1, None, 1, source="pixels", fits=True)
    pipe = train_graph(form, augmentation)
    inputs = {
        "pixels": picture.astype(np.uint8),
        "start": np.zeros(2, np.int32),
        "mirror": np.int32(0),
        "operations": np.array([OPERATIONS.index(name)], dtype=np.int32),
        "signs": np.array([sign], dtype=np.int32),
    }
    for key, value in inputs.items():
        pipe.feed_input(key, [np.asarray(value)])
    (images,) = pipe.run()
    return np.array(images.as_array()[0])


def test_operations_do_what_their_names_say(pictures):
    picture = picture_of(pictures, 0)
    assert np.array_equal(operated(picture, "identity", 30, 0), picture)
    bright, dark = (operated(picture, "brightness", 10, sign) for sign in (0, 1))
    assert bright.mean() > picture.mean() > dark.mean()
    assert np.abs(operated(picture, "brightness", 0, 0) - picture).max() <= 1
    left, right = (operated(picture, "translate_x", 10, sign) for sign in (0, 1))
    assert (left[:, 0] == 128).all() != (right[:, 0] == 128).all()
    assert np.array_equal(
        operated(picture, "solarize", 30, 0), np.where(picture < 0, picture, 255 - picture)
    )


def test_every_operation_is_chosen_as_often_with_either_sign():
    views = draw_views(STRONG, np.full((7000, 2), 24), image_size=SIDE, seed=0, position=0)
    for column in views.operations.T:
        counts = np.bincount(column)
        assert len(counts) == len(OPERATIONS)
        assert counts.min() > 400
    assert 0.47 < views.signs.mean() < 0.53
    assert not np.array_equal(views.operations[:, 0], views.operations[:, 1])


def test_strong_views_are_a_function_of_seed_and_position_alone(pictures):
    def make(**arguments) -> TrainLoader:
        return loader(pictures, strong=STRONG, **arguments)

    whole = take(make(batch_size=4), 6)
    ranks = [make(batch_size=2, rank=rank, world_size=2, threads=2) for rank in range(2)]
    spread = [next(one) for _ in range(2) for one in ranks]
    resumed = make(batch_size=8, cache="memory")
    resumed.load_state_dict(ranks[0].state_dict())
    stopped = spread + take(resumed, 2)
    for key in ("id", "image", "strong"):
        assert torch.equal(stream(whole, key), stream(stopped, key)), key
    other = take(make(seed=8), 6)
    assert not torch.equal(stream(whole, "strong"), stream(other, "strong"))


@pytest.mark.parametrize("weak", [PADDED, Augmentation(color=0.2)])
def test_a_strong_view_leaves_the_weak_one_as_it_is_and_shows_the_same_picture(pictures, weak):
    alone = take(loader(pictures, augmentation=weak), 4)
    both = take(loader(pictures, augmentation=weak, strong=weak), 4)
    assert torch.equal(stream(alone), stream(both))
    assert torch.equal(stream(alone, "id"), stream(both, "id"))
    assert not torch.equal(stream(both), stream(both, "strong"))
    still = Augmentation(crop="padded", padding=0, flip=False)
    for batch in take(loader(pictures, augmentation=weak, strong=still), 2):
        assert batch["strong"].is_contiguous(memory_format=torch.channels_last)
        for image, sample in zip(batch["strong"], batch["id"].tolist(), strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), picture_of(pictures, sample))


def test_strong_views_are_joined_too(pictures):
    loaders = [loader(pictures, strong=STRONG, seed=seed, batch_size=2) for seed in (1, 2)]
    alone = [next(loader(pictures, strong=STRONG, seed=seed, batch_size=2)) for seed in (1, 2)]
    assert torch.equal(next(JoinedLoader(loaders))["strong"], stream(alone, "strong"))


# --- mixup ---------------------------------------------------------------------------------------


def mixup(count: int = 4000, position: int = 0, **arguments):
    return draw_mixup(
        Augmentation(**arguments), batch_size=count, image_size=32, seed=1, position=position
    )


def test_shares_of_mixup_are_drawn_from_beta():
    for alpha in (0.2, 1.0, 5.0):
        combined = mixup(mixup=alpha)
        assert set(combined) == {"mixup_partner", "mixup_share"}
        assert abs(combined["mixup_share"].mean() - 0.5) < 0.02
        assert abs(combined["mixup_share"].var() - 1 / (4 * (2 * alpha + 1))) < 0.01
    assert np.array_equal(combined["mixup_partner"][:4], [1, 0, 3, 2])


def test_shares_of_cutmix_are_what_the_boxes_leave():
    combined = mixup(cutmix=1.0)
    box = combined["mixup_box"]
    assert box.min() >= 0
    assert box.max() <= 32
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    assert np.allclose(combined["mixup_share"], 1 - area / 1024)
    assert (area == 0).mean() < 0.05
    assert area.max() > 900


def test_mixup_and_cutmix_take_turns():
    combined = mixup(mixup=1.0, cutmix=1.0)
    cut = (combined["mixup_box"] != 0).any(axis=1)
    assert 0.44 < cut.mean() < 0.53
    area = np.where(cut, 1 - combined["mixup_share"], 0) * 1024
    assert np.allclose(area, np.round(area), atol=1e-3)


def test_how_a_pair_is_combined_depends_on_its_place_alone():
    whole, part = mixup(64, cutmix=1.0, mixup=0.3), mixup(8, 24, cutmix=1.0, mixup=0.3)
    for key in ("mixup_share", "mixup_box"):
        assert np.array_equal(whole[key][24:32], part[key])
