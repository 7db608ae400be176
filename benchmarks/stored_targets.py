"""Training towards stored pseudo-labels beside training on labels alone: steps a second.

    python benchmarks/stored_targets.py --json benchmarks/results/stored-targets.json

Same network, images in a step, loop and threads. Towards pseudo-labels a batch is of two streams,
and each of its images is looked up, by its id, among those of a set of ILSVRC's size: ten of a
thousand classes each. The network is small, so that this would show. Blocks of steps take turns in
this process, so that a change of the machine's speed meets both; `ratio` is the median over the
rounds of what the two take in one round.
"""

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timing import machine
from torch import Tensor, nn

from launchers.display import Display
from launchers.images import index_images
from pipelines.index import DataIndex
from pipelines.joined import JoinedLoader
from pipelines.loader import TrainLoader
from pipelines.reader import Reader
from sbf_dist import models
from sbf_dist.distill.task import DistillationTask, stored_targets
from sbf_dist.recipe import Data
from sbf_dist.settings import Optimizer
from sbf_dist.train.loop import Annotation, Every, fit
from sbf_dist.train.single import SingleEngine

IMAGES, CLASSES, TOP_K = 1_281_167, 1000, 10
BATCH = 64
BLOCK = 10  # steps
CASES = {"CIFAR ResNet-8, 32 px": "cifar_resnet8", "CIFAR ResNet-20, 32 px": "cifar_resnet20"}
Batch = dict[str, Tensor]


def store() -> Callable[[Batch], Batch]:
    """Return what joins random pseudo-labels of so many images to a batch."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(CLASSES, (IMAGES, 1), generator=generator)
    classes = (classes + torch.arange(TOP_K)) % CLASSES  # ten different ones
    probabilities = torch.rand(IMAGES, TOP_K, generator=generator)
    probabilities /= 1.1 * probabilities.sum(1, keepdim=True)
    return stored_targets(torch.arange(IMAGES), classes, probabilities, num_classes=CLASSES)


def trainer(
    model: str, data: Data, index: DataIndex, parts: dict[str, int], annotate: Annotation | None
) -> Callable[[], None]:
    """Return what trains a network of its own by a block of steps."""
    torch.manual_seed(0)
    network: nn.Module = models.build(model, CLASSES)
    engine = SingleEngine(DistillationTask(network), Optimizer(lr=1e-3))
    stream = JoinedLoader(
        [
            TrainLoader(
                index,
                [part],
                Reader(cache="memory"),
                batch_size=size,
                view=data.view,
                augmentation=data.augmentation,
                seed=0,
            )
            for part, size in parts.items()
        ]
    )

    def block() -> None:
        fit(
            engine,
            stream,
            steps=BLOCK,
            lr_at=lambda step: 1e-3,
            log=Every(None, lambda record: None),
            annotate=annotate,
        )

    return block


def measure(model: str, folder: Path, rounds: int) -> dict[str, float]:
    """Time both kinds of training in turn."""
    data = Data(source="photos", image_size=32, labelled_per_class=40)
    index = index_images(data, folder, 0, Display(Console(quiet=True)))
    kinds = {
        "labels": trainer(model, data, index, {"labelled": BATCH}, None),
        "stored": trainer(
            model, data, index, {"labelled": 16, "unlabelled": 48}, Annotation(store())
        ),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind, train in kinds.items():
            start = time.perf_counter()
            train()
            if number:  # the first decodes all images
                times[kind].append((time.perf_counter() - start) / BLOCK)
    ratios = [a / b for a, b in zip(times["labels"], times["stored"], strict=True)]
    steps = {f"{kind}_steps_per_s": 1 / statistics.median(own) for kind, own in times.items()}
    return {**steps, "ratio": statistics.median(ratios)}


def main() -> None:
    """Measure, print the table and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="sbf-stored-") as folder:
        rows = [
            {"case": case}
            | {k: round(v, 3) for k, v in measure(model, Path(folder), options.rounds).items()}
            for case, model in CASES.items()
        ]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if options.json:
        report = {
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "machine": machine(),
            "threads": 1,
            "images_in_store": IMAGES,
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
