"""Our training batches beside those of torchvision, webdataset and bare DALI, on a CPU.

    python benchmarks/loader.py --json benchmarks/results/loader.json

photographs   JPEG files of 500 × 375 pixels and quality 90, crops of real photographs, in the page
              cache: decoded, cropped at random, resized to 224, flipped, normalised; batches of 64
cifar         32 × 32 pixels, from memory: padded by 4, cropped, flipped, normalised; batches of 256
long list     1.28 million names: seconds from nothing (but the imports) to the first batch, and
              the resident memory

Two DALI threads, or two worker processes. The loaders take turns, first some batches to fill their
queues; rates are medians over the turns. webdataset is measured where it is installed. FFCV
is not measured: it needs OpenCV's headers to be built (ffcv 1.0.2, "Could not find required
package: opencv4").
"""

import argparse
import datetime
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import loader_long_list
import loader_peers as peers
import numpy as np
import torch
from loader_images import QUALITY, SIZE, photographs, write_crops, write_shards
from timing import machine
from torch import Tensor

from pipelines.augmentation import draw_views
from pipelines.index import DataIndex
from pipelines.loader import TrainLoader
from pipelines.memory import decode_all
from pipelines.reader import Reader
from pipelines.sources.folder import index_folder
from sbf_dist.settings import Augmentation, View

THREADS = 2
PHOTO_BATCH, CIFAR_BATCH = 64, 256
FILLING = 6  # batches before the clock starts: more than any queue holds
SETTLING = 0.5  # seconds in which the queues of the last turn fill up again
Batches = Iterator[Tensor]


PHOTO = Augmentation(min_scale=0.08)


def ours(
    index: DataIndex,
    batch: int,
    side: int,
    augmentation: Augmentation = PHOTO,
    cache: Literal["none", "memory"] = "none",
) -> Batches:
    loader = TrainLoader(
        index,
        ["labelled"],
        Reader(threads=THREADS, cache=cache),
        batch_size=batch,
        view=View(image_size=side, mean=peers.MEAN, std=peers.STD),
        augmentation=augmentation,
        seed=1,
    )
    return (batch["image"] for batch in loader)


def some_views(index: DataIndex) -> list[tuple[Any, Any, Any]]:
    """Crops and flips of thirty batches, as ours has them."""
    drawn = [
        draw_views(
            PHOTO,
            np.tile(index.sizes[:1], (PHOTO_BATCH, 1)),
            image_size=peers.SIDE,
            seed=2,
            position=PHOTO_BATCH * number,
        )
        for number in range(30)
    ]
    return [(views.anchor, views.shape, views.mirror) for views in drawn]


def rates(loaders: dict[str, Batches], *, batches: int, rounds: int) -> dict[str, float]:
    """Images per second of each loader, the median of its turns."""
    found: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, loader in loaders.items():
            time.sleep(SETTLING)
            for _ in range(FILLING):
                next(loader)
            start = time.perf_counter()
            images = sum(len(next(loader)) for _ in range(batches))
            found[name].append(images / (time.perf_counter() - start))
    return {name: round(statistics.median(values), 1) for name, values in found.items()}


def photo_rates(folder: Path, images: int, rounds: int) -> tuple[dict[str, float], float]:
    """Images per second of each way, and files per second of indexing."""
    root = folder / "photographs"
    write_crops(root, images)
    start = time.perf_counter()
    index = index_folder(root, labelled_per_class=None, validation=10, seed=0)
    indexing = images / (time.perf_counter() - start)
    loaders: dict[str, Batches | None] = {
        "ours": ours(index, PHOTO_BATCH, peers.SIDE),
        "bare DALI": peers.bare_dali(root, PHOTO_BATCH, THREADS, some_views(index)),
        "torchvision, Pillow": peers.torchvision_folder(root, PHOTO_BATCH, THREADS, draft=False),
        "torchvision, Pillow draft": peers.torchvision_folder(
            root, PHOTO_BATCH, THREADS, draft=True
        ),
        "torchvision.io": peers.loaded(peers.JpegFolder(root), PHOTO_BATCH, THREADS),
        "webdataset": peers.webdataset(write_shards(root, folder / "shards"), PHOTO_BATCH, THREADS),
    }
    present = {name: loader for name, loader in loaders.items() if loader is not None}
    return rates(present, batches=12, rounds=rounds), round(indexing, 1)


def cifar_rates(folder: Path, images: int, rounds: int) -> dict[str, float]:
    root = folder / "cifar"
    write_crops(root, images, size=(32, 32), kind="png")
    index = index_folder(root, labelled_per_class=None, validation=10, seed=0)
    ids = index.parts["labelled"]
    pixels = np.array(decode_all(index, ids, Reader(threads=THREADS)).take(ids))
    padded = Augmentation(crop="padded")
    strong = Augmentation(crop="padded", rand_augment=2)
    loaders = {
        "ours, in memory": ours(index, CIFAR_BATCH, 32, augmentation=padded, cache="memory"),
        "ours, from files": ours(index, CIFAR_BATCH, 32, augmentation=padded),
        "ours, in memory, RandAugment": ours(
            index, CIFAR_BATCH, 32, augmentation=strong, cache="memory"
        ),
        "torchvision, in memory": peers.loaded(peers.Cifar(pixels), CIFAR_BATCH, THREADS),
    }
    return rates(loaders, batches=30, rounds=rounds)


def one_photograph() -> bytes:
    encoded = io.BytesIO()
    photographs()[0].resize(SIZE).save(encoded, "JPEG", quality=QUALITY)
    return encoded.getvalue()


# --- all of it -----------------------------------------------------------------------------------


def show(title: str, values: dict[str, float]) -> None:
    print(f"{title}: " + ", ".join(f"{name} {value:,.4g}" for name, value in values.items()))


def ratios(values: dict[str, float], of: str) -> dict[str, float]:
    return {name: round(values[of] / value, 3) for name, value in values.items() if name != of}


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--images", type=int, default=3000, help="photographs; default 3000")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each loader; default 5")
    options = parser.parse_args()
    torch.set_num_threads(1)

    def measured(measure: Callable[[Path], Any]) -> Any:
        with tempfile.TemporaryDirectory(prefix="loader-") as folder:
            return measure(Path(folder))

    photos, indexing = measured(lambda folder: photo_rates(folder, options.images, options.rounds))
    show("photographs, images/s", photos)
    show("  ours is so many times", ratios(photos, "ours"))
    cifar = measured(lambda folder: cifar_rates(folder, 10_000, options.rounds))
    show("cifar, images/s", cifar)
    long = measured(lambda folder: loader_long_list.measure(folder, one_photograph()))
    show("long list", long)
    if options.json:
        result = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": THREADS,
            "load_average": round(os.getloadavg()[0], 1),
            "photographs": {
                "images": options.images,
                "images_per_s": photos,
                "ours_over": ratios(photos, "ours"),
                "indexing_files_per_s": indexing,
            },
            "cifar": {
                "images_per_s": cifar,
                "ours_over": ratios(cifar, "ours, in memory"),
            },
            "long_list": {"names": loader_long_list.NAMES} | long,
            "not_measured": {"ffcv": "does not install: needs OpenCV's headers (opencv4)"},
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
