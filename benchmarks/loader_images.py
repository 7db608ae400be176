"""Real pictures for benchmarks of loading: crops of photographs that two packages bring along."""

import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_images

CLASSES = 10
SIZE = (500, 375)  # about the mean of ImageNet's
QUALITY = 90
_PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "immunohistochemistry", "retina")


def photographs() -> list[Image.Image]:
    """Eight photographs, of 427 × 640 pixels and thereabouts."""
    arrays = [getattr(skimage.data, name)() for name in _PHOTOGRAPHS]
    return [Image.fromarray(array) for array in (*arrays, *load_sample_images().images)]


def write_crops(root: Path, count: int, *, size: tuple[int, int] = SIZE, kind: str = "jpg") -> None:
    """Write `count` random crops to root/<class>/<number>.<kind>, all of one size."""
    sources = photographs()

    def write(number: int) -> None:
        draw = np.random.default_rng(number)
        source = sources[number % len(sources)]
        share = draw.uniform(0.5, 1.0)
        scale = share * min(source.width / size[0], source.height / size[1])
        width, height = scale * size[0], scale * size[1]
        left = draw.uniform(0, source.width - width)
        top = draw.uniform(0, source.height - height)
        box = (left, top, left + width, top + height)
        crop = source.resize(size, Image.Resampling.BICUBIC, box=box)
        if draw.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        path = root / f"{number % CLASSES}" / f"{number:06}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop.save(path, quality=QUALITY)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(count)))


def write_shards(root: Path, folder: Path, *, per_shard: int = 1000) -> list[Path]:
    """The same pictures as tar files, as webdataset reads them."""
    folder.mkdir(parents=True)
    files = sorted(root.rglob("*.jpg"), key=lambda path: path.stem)
    shards = []
    for start in range(0, len(files), per_shard):
        shards.append(folder / f"{start // per_shard:05}.tar")
        with tarfile.open(shards[-1], "w") as tar:
            for path in files[start : start + per_shard]:
                tar.add(path, f"{path.parent.name}-{path.name}")
    return shards
