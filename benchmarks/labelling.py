"""Images per second that are labelled beside those that the teachers' networks take alone.

    python benchmarks/labelling.py --json benchmarks/results/labelling.json

bare        the teachers' forward passes, one after the other, on images that lie in memory as the
            loader gives them, batches of 128
labelling   what a worker of sbf label does: files are read, decoded, resized and normalised; the
            teachers' probabilities are averaged, summarised and written as Parquet

Both take turns; ratios are those of a turn. Processor time says the same where other programs keep
the machine busy. Photographs are JPEG files of 500 × 375 pixels, seen at 224; with two views, the
second teacher sees them at 192, and each view is decoded by itself. Weights are random.
"""

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loader_images import write_crops
from rich.console import Console
from rich.table import Table
from timing import machine

from launchers.display import Display
from launchers.images import index_images
from launchers.run import labelling
from launchers.run.folder import RunFolder
from launchers.run.networks import Networks
from launchers.run.worker import Context, ensemble_of
from sbf_dist import models
from sbf_dist.distill import pseudo_labels
from sbf_dist.recipe import Recipe
from sbf_dist.weights import save_weights

TRAINING = {"steps": 1, "batch_size": 8}
PHOTO = ("timm:resnet18", "timm:resnet34")
# Title, networks, sides of their inputs, size and kind of the files, images.
CASES = (
    ("photographs", PHOTO, (224, 224), (500, 375), "jpg", 96),
    ("photographs, two views", PHOTO, (224, 192), (500, 375), "jpg", 96),
    ("32 pixels", ("cifar_resnet14", "cifar_resnet20"), (32, 32), (32, 32), "png", 1024),
)


def worker_on(
    root: Path, networks: tuple[str, ...], sides: tuple[int, ...], threads: int
) -> Context:
    """The only worker of a run on the images in `root`, whose teachers are these networks."""
    recipe = Recipe.model_validate(
        {
            "name": "labelling",
            "data": {
                "source": "folder",
                "root": root,
                "validation": 10,
                "image_size": sides[0],
                "threads": threads,
            },
            "teachers": [
                {"name": f"teacher-{n}", "model": model, "image_size": side, "training": TRAINING}
                for n, (model, side) in enumerate(zip(networks, sides, strict=True))
            ],
            "compress": {"teacher": "teacher-0", "macs": 0.5},
            "distill": {"training": TRAINING},
        }
    )
    records = Networks.of(recipe, RunFolder(root.parent / "runs", recipe.name))
    index = index_images(recipe.data, root.parent / "runs", recipe.seed, Display())
    here = Context(records, index, rank=0, world_size=1, device=torch.device("cpu"))
    for teacher in records.teachers:
        save_weights(models.build(teacher.model, here.num_classes), teacher.weights)
    return here


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds of processor time, that some work takes."""
    start, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - processor


def measure(here: Context, rounds: int) -> dict[str, Any]:
    """Label, and let the networks alone take the same images, in turns."""
    ensemble = ensemble_of(here)
    ids = labelling.labelled_ids(here.index)
    inputs = [
        [batch["image"].clone(memory_format=torch.preserve_format) for batch in loader]
        for loader in (labelling.loader_of(here, view, ids) for view in ensemble.views)
    ]
    chunks = dict(enumerate(pseudo_labels.chunks(ids)))
    here.folder.pseudo_labels.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def bare() -> None:
        for member, batches in zip(ensemble.members, inputs, strict=True):
            for images in batches:
                member.network(images)

    def label() -> None:
        labelling.write_chunks(here, ensemble, chunks)

    turns = [(spent(bare), spent(label)) for _ in range(rounds + 1)][1:]
    return {
        "bare_images_per_s": round(len(ids) / statistics.median(b[0] for b, _ in turns), 1),
        "images_per_s": round(len(ids) / statistics.median(w[0] for _, w in turns), 1),
        "ratio": round(statistics.median(b[0] / w[0] for b, w in turns), 3),
        "processor_ratio": round(statistics.median(b[1] / w[1] for b, w in turns), 3),
    }


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, and of DALI")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    table = Table("teachers", "bare images/s", "labelling images/s", "ratio", "processor time")
    for title, networks, sides, size, kind, images in CASES:
        with tempfile.TemporaryDirectory() as place:
            write_crops(Path(place) / "images", images, size=size, kind=kind)
            here = worker_on(Path(place) / "images", networks, sides, options.threads)
            figures = measure(here, options.rounds)
        row = {"images": title, "teachers": networks, "sides": sides, "count": images, **figures}
        rows.append(row)
        print(row, flush=True)  # it takes minutes
        table.add_row(title, *(str(value) for value in figures.values()))
    Console(width=100).print(table)
    if options.json is not None:
        result = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "threads": options.threads,
            "load_average": os.getloadavg()[0],
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
