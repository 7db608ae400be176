"""Other ways to the same batches: torchvision's DataLoader, webdataset, DALI's own operators.

Each function gives an endless iterator of float32 batches (b, 3, 224, 224): JPEG decoded, a random
crop of 8 to 100 % of the area resized to 224 (bilinear), flipped half of the time, normalised.
"""

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from nvidia import dali
from nvidia.dali.pipeline import Pipeline
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 224
fn: Any = dali.fn
types: Any = dali.types

PILLOW_VIEW = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIDE),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
)


def open_whole(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def open_draft(path: str) -> Image.Image:
    """JPEG decoded at 1/2 or less where its sides stay above the square's."""
    with Image.open(path) as image:
        image.draft("RGB", (SIDE, SIDE))
        return image.convert("RGB")


class JpegFolder(Dataset[tuple[Tensor, int]]):
    """torchvision.io's decoder and transforms of uint8 tensors."""

    def __init__(self, root: Path) -> None:
        self.samples = datasets.ImageFolder(str(root)).samples
        self.view = v2.Compose(
            [
                v2.RandomResizedCrop(SIDE, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        path, label = self.samples[number]
        data = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)
        return self.view(decode_jpeg(data)), label


class Cifar(Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR10: pixels in memory, padded crops by Pillow."""

    def __init__(self, pixels: Any) -> None:
        self.pixels = pixels
        self.view = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.view(Image.fromarray(self.pixels[number])), 0


def torchvision_folder(root: Path, batch: int, workers: int, *, draft: bool) -> Iterator[Tensor]:
    opener = open_draft if draft else open_whole
    return loaded(datasets.ImageFolder(str(root), PILLOW_VIEW, loader=opener), batch, workers)


def loaded(dataset: Dataset, batch: int, workers: int) -> Iterator[Tensor]:
    loader = DataLoader(
        dataset, batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True
    )
    while True:
        for images, _ in loader:
            yield images


def decode_member(sample: dict[str, Any]) -> tuple[Tensor, int]:
    with Image.open(io.BytesIO(sample["jpg"])) as image:
        return PILLOW_VIEW(image.convert("RGB")), int(sample["__key__"][0])


def webdataset(shards: list[Path], batch: int, workers: int) -> Iterator[Tensor] | None:
    """None where the package is not installed."""
    if importlib.util.find_spec("webdataset") is None:
        return None
    import webdataset as wds

    urls = [str(shard) for shard in shards]
    samples = wds.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(1000)
    batches = samples.map(decode_member).batched(batch, partial=False)
    loader = DataLoader(batches, batch_size=None, num_workers=workers)
    return (torch.as_tensor(images) for images, _ in loader)


def bare_dali(
    root: Path, batch: int, threads: int, views: list[tuple[Any, Any, Any]]
) -> Iterator[Tensor]:
    """The same operators with DALI's own reader, on crops that were drawn before.

    `views` are anchors (b, 2), shapes (b, 2) and mirrors (b,) of batches, used again and again:
    DALI's own random crop rejects those that do not fit, and so resizes smaller ones.
    """
    pipe = Pipeline(batch, threads, None, prefetch_queue_depth=2, seed=1)
    with pipe:
        encoded, _ = fn.readers.file(file_root=str(root), random_shuffle=True, initial_fill=1024)
        anchor, shape, mirror = fn.external_source(source=views, num_outputs=3, cycle=True)
        images = fn.decoders.image_slice(
            encoded, anchor, shape, axis_names="HW", device="cpu", output_type=types.RGB
        )
        images = fn.resize(images, size=[SIDE, SIDE], antialias=True)
        pipe.set_outputs(
            fn.crop_mirror_normalize(
                images,
                mirror=mirror,
                mean=[255 * value for value in MEAN],
                std=[255 * value for value in STD],
                dtype=types.FLOAT,
                output_layout="HWC",
            )
        )
    pipe.build()
    while True:
        (images,) = pipe.run()
        yield torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
