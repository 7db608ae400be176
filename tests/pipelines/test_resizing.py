import numpy as np
import pytest
import torch
from pictures import smooth_picture
from PIL import Image

from pipelines.graphs import Form, train_graph
from pipelines.index import DataIndex
from pipelines.loader import TrainLoader
from pipelines.reader import Reader
from pipelines.resizing import resized_batch
from pipelines.sources.folder import index_folder
from sbf_dist.settings import Augmentation, View

SIDE = 24


def form(**arguments) -> Form:
    plain = {"mean": (0, 0, 0), "std": (1 / 255, 1 / 255, 1 / 255)}
    return Form(
        batch_size=1, image_size=SIDE, threads=1, device_id=None, prefetch=1, **(plain | arguments)
    )


@pytest.mark.parametrize("size", [(24, 24), (80, 51), (13, 40), (1, 1), (300, 200)])
def test_it_resizes_as_pillow_does_and_mirrors(size):
    picture = smooth_picture(*size)
    crop = torch.from_numpy(np.array(picture))
    batch = resized_batch([crop, crop], np.array([0, 1]), form())
    expected = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=float)
    assert batch.shape == (2, 3, SIDE, SIDE)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert np.abs(batch[0].permute(1, 2, 0).numpy() - expected).max() <= 1
    assert torch.equal(batch[1], batch[0].flip(2))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_normalisation_is_that_of_images_in_0_to_1(dtype):
    colour = torch.tensor([10, 130, 255], dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    crop = colour.expand(30, 40, 3).contiguous()
    settings = form(mean=mean.tolist(), std=std.tolist(), dtype=dtype)
    batch = resized_batch([crop], np.array([1]), settings)
    assert batch.dtype == getattr(torch, dtype)
    expected = ((colour / 255 - mean) / std)[:, None, None].expand(3, SIDE, SIDE)
    tolerance = 1e-5 if dtype == "float32" else 2e-3
    assert torch.allclose(batch[0].float(), expected, atol=tolerance)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> DataIndex:
    root = tmp_path_factory.mktemp("photographs")
    (root / "a").mkdir()
    for k in range(10):
        smooth_picture(90 + 13 * k, 120 - 4 * k).save(root / "a" / f"{k}.jpg", quality=95)
    return index_folder(root, labelled_per_class=None, validation=2, seed=0)


def test_batches_are_those_that_the_whole_graph_makes(photographs, monkeypatch):
    def batches():
        loader = TrainLoader(
            photographs,
            ["labelled"],
            Reader(),
            batch_size=4,
            view=View(image_size=SIDE, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255)),
            augmentation=Augmentation(min_scale=0.1),
            seed=5,
        )
        return [next(loader) for _ in range(4)]

    ours = batches()
    monkeypatch.setattr(TrainLoader, "_resizes_itself", False)
    for one, other in zip(ours, batches(), strict=True):
        assert torch.equal(one["id"], other["id"])
        difference = (one["image"] - other["image"]).abs()
        assert difference.mean() < 0.6
        assert difference.max() <= 6  # DALI repeats the border where Pillow leaves it out


def test_the_whole_graph_still_takes_what_the_view_asks_for():
    pipe = train_graph(form(source="pixels"), Augmentation())
    picture = np.array(smooth_picture(40, 30))
    inputs = {
        "pixels": picture,
        "anchor": np.float32([0.1, 0.2]),
        "shape": np.float32([0.5, 0.5]),
        "mirror": np.int32(0),
    }
    for name, value in inputs.items():
        pipe.feed_input(name, [np.asarray(value)])
    (images,) = pipe.run()
    crop = torch.from_numpy(picture[3:18, 8:28].copy())
    ours = resized_batch([crop], np.array([0]), form())[0].permute(1, 2, 0).numpy()
    assert np.abs(np.array(images.as_array()[0]) - ours).max() <= 1
