"""Batches out of a set in an object store beside those of the same shards in a folder.

    python benchmarks/object_data.py --json benchmarks/results/object-data.json

warm    every shard is in this machine's cache: images per second of both, which take turns, and
        milliseconds of processor time for an image, which other programs disturb less; medians over
        the turns, ratios within a turn
cold    an empty cache, and a link to the store that passes so many bytes per second: seconds of the
        first epoch, and until all training shards are here, beside the least possible: the shards'
        bytes by the rate, or an epoch from the folder where that takes longer

The store is moto's server, in a process of its own; the link is a proxy. Photographs of 500 × 375
pixels are decoded, cropped at random, resized to 224, flipped and normalised by two threads, in
batches of 64.
"""

import argparse
import datetime
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import torch
from loader_images import SIZE, write_crops
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import machine

# The root as well, so that tests/pipelines does not hide pipelines.
sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("", "tests"))
from s3_double import s3_server
from store_link import Link, link_to

from pipelines.index import DataIndex
from pipelines.loader import TrainLoader
from pipelines.reader import Reader
from pipelines.remote.shard_cache import ShardCache
from pipelines.sources.folder import index_folder
from pipelines.sources.manifest import SCHEMA, Manifest, write_samples
from pipelines.sources.shards import write_shard
from sbf_dist.object_storage import ObjectFolder
from sbf_dist.settings import Augmentation, View

THREADS, BATCH, SIDE = 2, 64, 224
HELD_OUT = 0.02
CLASSES = 10
PER_SHARD = 100
FILLING, TURN = 3, 12  # batches of a turn: before the clock starts, and timed
CONSOLE = Console(width=140)


def write_set(folder: Path, images: int) -> None:
    """Write a prepared set in shards: random crops of photographs, in random order."""
    with tempfile.TemporaryDirectory() as crops:
        write_crops(Path(crops), images)
        files = sorted(Path(crops).rglob("*.jpg"))
        order = np.random.default_rng(0).permutation(len(files))
        held_out = round(HELD_OUT * len(files))
        shards: list[dict[str, Any]] = []
        rows: list[dict[str, Any]] = []
        for part, ids in (("val", order[:held_out]), ("train", order[held_out:])):
            for start in range(0, len(ids), PER_SHARD):
                chosen = [files[row] for row in ids[start : start + PER_SHARD]]
                name = f"{part}-{start // PER_SHARD:06}.tar"
                samples = [(f"{part}/{p.parent.name}/{p.name}", p) for p in chosen]
                shard = write_shard(
                    folder / name,
                    ((file, int(p.parent.name), p.read_bytes()) for file, p in samples),
                )
                for (file, path), offset in zip(samples, shard.offsets, strict=True):
                    data = path.read_bytes()
                    rows.append(
                        {
                            "file": file, "label": int(path.parent.name), "bytes": len(data),
                            "sha256": hashlib.sha256(data).hexdigest(), "height": SIZE[1],
                            "width": SIZE[0], "fault": None, "shard": len(shards), "offset": offset,
                        }
                    )  # fmt: skip
                shards.append(
                    {
                        "file": name, "bytes": shard.bytes, "sha256": shard.sha256,
                        "index_sha256": "", "samples": len(chosen),
                    }
                )  # fmt: skip
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["file"]), schema=SCHEMA)
    Manifest(
        set="photographs",
        layout="webdataset",
        seed=0,
        archives=[],
        classes=[{"folder": str(k), "name": str(k), "train": 0, "val": 0} for k in range(CLASSES)],
        counts={"train": images - held_out, "val": held_out},
        content="",
        samples=write_samples(folder, table),
        shards=shards,
    ).write(folder)


def indexed(place: Path | str) -> DataIndex:
    return index_folder(place, labelled_per_class=None, validation=None, seed=0)


def batches(index: DataIndex, cache: ShardCache | None) -> TrainLoader:
    return TrainLoader(
        index,
        ["labelled"],
        Reader(threads=THREADS, shard_cache=cache),
        batch_size=BATCH,
        view=View(image_size=SIDE, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        augmentation=Augmentation(min_scale=0.08),
        seed=1,
    )


def seconds_of(loader: TrainLoader, count: int) -> tuple[float, float]:
    """Return seconds, and seconds of the processor, that so many batches take."""
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(loader)
    return time.perf_counter() - start, time.process_time() - cpu


def warm(local: DataIndex, stored: DataIndex, cache: ShardCache, rounds: int) -> dict[str, float]:
    """Images per second, and processor time for an image, of both, in turns of some batches."""
    loaders = {"folder": batches(local, None), "cache": batches(stored, cache)}
    for loader in loaders.values():  # an epoch: shards come here, files into the page cache
        seconds_of(loader, -(-len(local.parts["labelled"]) // BATCH))
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    costs: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in track(range(rounds), "warm", console=CONSOLE):
        for name in sorted(loaders, reverse=turn % 2 == 1):
            seconds_of(loaders[name], FILLING)
            seconds, cpu = seconds_of(loaders[name], TURN)
            rates[name].append(TURN * BATCH / seconds)
            costs[name].append(1e3 * cpu / (TURN * BATCH))
    for loader in loaders.values():
        loader.close()
    speed = [a / b for a, b in zip(rates["cache"], rates["folder"], strict=True)]
    cost = [a / b for a, b in zip(costs["cache"], costs["folder"], strict=True)]
    found = {f"{name}_images_per_s": statistics.median(rates[name]) for name in loaders}
    found |= {"cache_over_folder": statistics.median(speed)}
    found |= {f"{name}_cpu_ms": statistics.median(costs[name]) for name in loaders}
    found |= {"cpu_cache_over_folder": statistics.median(cost)}
    found |= {"cpu_least": min(cost), "cpu_most": max(cost)}
    return {name: round(value, 3) for name, value in found.items()}


def cold(
    stored: DataIndex, folder: Path, link: Link, rate: float, folder_rate: float
) -> dict[str, float]:
    """The first epoch with an empty cache over a link of so many bytes per second."""
    count = -(-len(stored.parts["labelled"]) // BATCH)
    assert stored.contents is not None and stored.shard is not None
    used = np.unique(stored.shard[stored.parts["labelled"]])
    volume = sum(stored.contents.shard_bytes[shard] for shard in used)
    loader = batches(stored, ShardCache(folder))
    link.rate, before = rate, link.sent
    start, fetched = time.perf_counter(), 0.0
    for _ in track(range(count), "cold", console=CONSOLE):
        next(loader)
        if not fetched and sum(not p.suffix for p in (folder / "objects").iterdir()) == len(used):
            fetched = time.perf_counter() - start
    seconds = time.perf_counter() - start
    sent, link.rate = link.sent - before, None
    loader.close()
    link_seconds, epoch = volume / rate, count * BATCH / folder_rate
    least = max(link_seconds, epoch)
    return {
        "mb_per_s": rate / 1e6,
        "shards_mb": round(volume / 1e6, 1),
        "sent_mb": round(sent / 1e6, 1),
        "link_seconds": round(link_seconds, 2),
        "folder_epoch_seconds": round(epoch, 2),
        "first_epoch_seconds": round(seconds, 2),
        "first_epoch_over_least": round(seconds / least, 3),
        "fetched_seconds": round(fetched or seconds, 2),
    }


def serve(environment: Any, ready: Event, done: Event) -> None:
    with s3_server() as double:
        environment.update(double.environment, bucket=double.bucket)
        ready.set()
        done.wait()


def show(title: str, rows: list[dict[str, float]]) -> None:
    table = Table(*(name.replace("_", " ") for name in rows[0]), title=title)
    for row in rows:
        table.add_row(*(f"{value:,.4g}" for value in row.values()))
    CONSOLE.print(table)


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--images", type=int, default=2000, help="photographs; default 2000")
    parser.add_argument("--rounds", type=int, default=40, help="turns of each loader; default 40")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[2, 8, 64], help="of the link, MB/s"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="object-data-")))
        spawned = get_context("spawn")
        environment = stack.enter_context(spawned.Manager()).dict()
        ready, done = spawned.Event(), spawned.Event()
        server = spawned.Process(target=partial(serve, environment, ready, done))
        server.start()
        stack.callback(server.join)
        stack.callback(done.set)
        assert ready.wait(300), "no server"
        link = stack.enter_context(link_to(urlsplit(environment["AWS_ENDPOINT_URL"]).port))
        bucket = environment.pop("bucket")
        os.environ.update(environment)
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{link.port}"
        shards = folder / "shards"
        shards.mkdir()
        write_set(shards, options.images)
        store = ObjectFolder.at(f"{bucket}/photographs")
        for path in track(sorted(shards.iterdir()), "upload", console=CONSOLE):
            store.put(path, path.name)
        local, stored = indexed(shards), indexed(store.address)
        assert local.digest == stored.digest
        found = warm(local, stored, ShardCache(folder / "warm"), options.rounds)
        show("every shard in the cache", [found])
        epochs = []
        for number, rate in enumerate(options.rates):
            epochs.append(
                cold(
                    stored,
                    folder / f"cold-{number}",
                    link,
                    rate * 1e6,
                    found["folder_images_per_s"],
                )
            )
        show("first epoch with an empty cache", epochs)
    if options.json:
        result = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "cores": len(os.sched_getaffinity(0)),
            # Above the number of cores, other programs were at work: then rates say little.
            "load_average": {
                "before": round(load, 1),
                "after": round(os.getloadavg()[0], 1),
            },
            "threads": THREADS,
            "batch": BATCH,
            "images": options.images,
            "shards": len(local.shards),
            "turns": options.rounds,
            "warm": found,
            "cold": epochs,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
