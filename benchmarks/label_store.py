"""A store of pseudo-labels as large as ILSVRC-2012: its bytes, and what reading it takes.

    python benchmarks/label_store.py --json benchmarks/results/label-store.json

Of 1.2 million images and 1,000 classes, k = 10. Predictions are softmaxes of random logits whose
scale differs from image to image, so that confidences are spread as those of a network on ImageNet
are; the classes of an image have nothing to do with each other, which real ones have: these
compress worse. There are 20 different chunks, written again and again: each file is compressed
alone.

open     seconds until a rank can read the store: the first of a node, which decodes the Parquet
         files and writes the mapped one, and the others
choose   seconds for a rank to select by a threshold adapted to each class
join     milliseconds for the targets of a batch of 256 random images, all 1,000 classes
memory   MB of the mapped file that each of four ranks has at the same time, after it has joined
         batches until all pages were read: resident, its share of that (Pss), its own alone
"""

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import machine

from sbf_dist.distill import pseudo_labels
from sbf_dist.distill.selection import choose
from sbf_dist.distill.stored_labels import StoredLabels, load
from sbf_dist.distill.summaries import Summary
from sbf_dist.distill.task import stored_targets
from sbf_dist.settings import PseudoLabels

IMAGES, CLASSES, TOP_K = 1_200_000, 1000, 10
DIFFERENT = 20  # chunks
RANKS, BATCH = 4, 256
SETTINGS = PseudoLabels(top_k=TOP_K, threshold=0.7, adaptive=True)


def predictions(images: int, generator: torch.Generator) -> list[torch.Tensor]:
    """The probabilities of two teachers that agree mostly, (images, CLASSES) each."""
    scale = 4 + 12 * torch.rand(images, 1, generator=generator)
    shared = torch.randn(images, CLASSES, generator=generator)
    return [
        (scale * (shared + 0.1 * torch.randn(images, CLASSES, generator=generator))).softmax(1)
        for _ in range(2)
    ]


def write(folder: Path, images: int) -> tuple[float, float]:
    """Write a store; seconds of writing alone, and the mean confidence."""
    generator = torch.Generator().manual_seed(0)
    pseudo_labels.begin(folder, {})
    ids = np.arange(images)
    seconds, confidence = 0.0, 0.0
    drawn = [predictions(pseudo_labels.CHUNK_IMAGES, generator) for _ in range(DIFFERENT)]
    for number, chunk in enumerate(track(pseudo_labels.chunks(ids), "writing")):
        each = [said[: len(chunk)] for said in drawn[number % DIFFERENT]]
        start = time.perf_counter()
        summary = Summary.of(torch.stack(each).mean(0), each, TOP_K)
        pseudo_labels.write_chunk(folder, number, chunk, summary)
        seconds += time.perf_counter() - start
        confidence += float(summary.probabilities[:, 0].sum())
    names = [f"n{number:08}" for number in range(CLASSES)]
    pseudo_labels.finish(folder, ids, classes=names, teachers=["one", "two"])
    return seconds, confidence / images


def timed_join(stored: StoredLabels, batches: int) -> list[float]:
    """Join batches of random images; the seconds of each."""
    columns = (stored.ids, stored.classes, stored.probabilities)
    join = stored_targets(*map(torch.from_numpy, columns), num_classes=CLASSES)
    draw = np.random.default_rng(os.getpid())
    found = []
    for _ in range(batches):
        ids = torch.from_numpy(draw.integers(0, len(stored), BATCH))
        start = time.perf_counter()
        join({"id": ids})
        found.append(time.perf_counter() - start)
    return found


def memory_of(mapped: str) -> dict[str, float]:
    """MB of a mapped file that this process has, by the kernel's account."""
    found = dict.fromkeys(("Rss", "Pss", "Private_Dirty"), 0.0)
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = mapped in line
        elif inside and line.partition(":")[0] in found:
            found[line.partition(":")[0]] += int(line.split()[1]) / 1e3
    return {key: round(value, 1) for key, value in found.items()}


def rank(folder: Path, together: Barrier) -> dict[str, Any]:
    """What one of the ranks of a node does, and what it has then."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    stored = load(folder, {})
    opened = time.perf_counter() - start
    start = time.perf_counter()
    chosen = choose(stored, stored.ids, SETTINGS)
    chose = time.perf_counter() - start
    seconds = timed_join(stored, 400)
    for column in stored.columns().values():
        column.max()  # reads all pages
    together.wait()
    memory = memory_of("/.mapped-")
    together.wait()
    return {
        "open_s": opened,
        "choose_s": chose,
        "join_ms": 1e3 * statistics.median(seconds[20:]),
        "used": len(chosen),
        "memory": memory,
    }


def _start(barrier: Barrier) -> None:
    global _barrier  # noqa: PLW0603  a barrier cannot be sent to a process that runs
    _barrier = barrier


def _rank(folder: Path) -> dict[str, Any]:
    return rank(folder, _barrier)


def measure(images: int) -> dict[str, Any]:
    """Write a store and let the ranks of a node read it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        seconds, confidence = write(folder, images)
        kept = [p for p in folder.iterdir() if p.name[0] != "."]
        size = sum(path.stat().st_size for path in kept)
        start = time.perf_counter()
        load(folder, {})
        first = time.perf_counter() - start
        (mapped,) = folder.glob(pseudo_labels.MAPPED)
        context = get_context("spawn")
        with context.Pool(RANKS, _start, [context.Barrier(RANKS)]) as pool:
            ranks = pool.map(_rank, [folder] * RANKS, chunksize=1)
        return {
            "images": images,
            "classes": CLASSES,
            "k": TOP_K,
            "mean_confidence": round(confidence, 3),
            "files": len(kept),
            "megabytes": round(size / 1e6, 2),
            "bytes_per_image": round(size / images, 2),
            "mapped_megabytes": round(mapped.stat().st_size / 1e6, 1),
            "write_images_per_s": round(images / seconds),
            "first_open_s": round(first, 2),
            "open_s": round(statistics.median(r["open_s"] for r in ranks), 4),
            "choose_s": round(statistics.median(r["choose_s"] for r in ranks), 3),
            "join_ms": round(statistics.median(r["join_ms"] for r in ranks), 3),
            "used": ranks[0]["used"],
            "ranks": RANKS,
            "memory_mb_of_each_rank": [r["memory"] for r in ranks],
        }


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    options = parser.parse_args()
    torch.set_num_threads(2)
    row = measure(options.images)
    table = Table("figure", "value")
    for key, value in row.items():
        table.add_row(key, str(value))
    Console(width=100).print(table)
    if options.json is not None:
        result = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "load_average": os.getloadavg()[0],
            **row,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
