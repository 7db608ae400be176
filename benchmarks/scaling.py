"""The model of training time on many GPUs, against published trainings and runs of our own.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json --plot docs/scaling.png

Published: speed-ups over the smaller number of GPUs, against what launchers/estimate predicts for
such machines. Own: a training on two ranks of this machine, each with one thread, beside two
trainings of one rank at the same time, which share the machine but exchange nothing, and gloo's sum
of as many bytes as the gradients; the model predicts the first from the others.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from timing import machine as this_machine

from launchers.estimate.machines import MACHINES, RESNET50_MACS, Link, Machine
from launchers.estimate.timing import (
    BACKWARD,
    NO_OVERLAP,
    OVERLAP,
    Work,
    step_time,
    straggling_time,
)
from sbf_dist import models
from sbf_dist.distill.task import DistillationTask
from sbf_dist.settings import Optimizer
from sbf_dist.train.engine import build_engine

# Multiply-adds of an image at 224 px, parameters, layers.
NETWORKS = {
    "ResNet-50": (RESNET50_MACS, 25.56e6, 175),
    "ResNet-101": (7.80e9, 44.55e6, 345),
    "VGG-16": (15.47e9, 138.36e6, 39),
}
FLOAT_BYTES, HALF_BYTES = 4, 2
GPUS_SHOWN = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Published:
    """A speed-up that was published.

    images_per_s  of one GPU, and `images` of a step on it
    number_bytes  of a gradient
    inside, between  line rates, bytes a second
    """

    what: str
    source: str
    network: str
    images_per_s: float
    images: int
    number_bytes: int
    gpus_a_machine: int
    inside: float
    between: float
    gpus: tuple[int, int]
    speed_up: float

    def machine(self) -> Machine:
        """Describe the machines by the same rules as those of launchers/estimate/machines.py."""
        like = MACHINES["p4d.24xlarge"]
        macs = NETWORKS[self.network][0]
        return Machine(
            name=self.what,
            gpu="",
            gpus=self.gpus_a_machine,
            gpu_bytes=0,
            training_macs_per_s=3 * macs * self.images_per_s,
            layer_s=0,
            cpus=10**6,  # images are synthetic, or prepared
            inside=Link(0.8 * self.inside, like.inside.latency_s),
            between=Link(0.8 * self.between, like.between.latency_s),
        )

    def predicted(self) -> float:
        """Return the speed-up by the model."""
        macs, parameters, layers = NETWORKS[self.network]
        work = Work(macs, 0, layers, 0, parameters * self.number_bytes)
        few, many = (
            step_time(work, self.machine(), gpus=n, images=self.images, overlap=OVERLAP).total
            for n in self.gpus
        )
        return self.gpus[1] / self.gpus[0] * few / many


_NVIDIA = "NVIDIA DeepLearningExamples, ResNet50 v1.5 for PyTorch, README"
_HOROVOD = "Horovod, docs/benchmarks.rst and README"
PUBLISHED = (
    Published(
        "DGX A100, mixed", _NVIDIA, "ResNet-50", 2470, 256, HALF_BYTES, 8, 300e9, 25e9,
        (1, 8), 16621 / 2470,
    ),
    Published(
        "DGX A100, TF32", _NVIDIA, "ResNet-50", 938, 256, FLOAT_BYTES, 8, 300e9, 25e9,
        (1, 8), 7248 / 938,
    ),
    Published(
        "DGX-1 V100, mixed", _NVIDIA, "ResNet-50", 1200, 256, HALF_BYTES, 8, 150e9, 12.5e9,
        (1, 8), 8322 / 1200,
    ),
    Published(
        "DGX-1 V100, fp32", _NVIDIA, "ResNet-50", 367, 128, FLOAT_BYTES, 8, 150e9, 12.5e9,
        (1, 8), 2855 / 367,
    ),
    # 90 epochs take 29 hours on 8 GPUs (NVIDIA's report): 138 images/s each. 50 Gbit/s Ethernet.
    Published(
        "Big Basin P100, 8 to 256", "Goyal et al. 2017, arXiv 1706.02677: about 90 %", "ResNet-50",
        138, 32, FLOAT_BYTES, 8, 80e9, 50e9 / 8, (8, 256), 0.90 * 32,
    ),
    # 1,656.82 images/s on 16 GPUs; 25 Gbit/s RoCE, 4 GPUs a server.
    Published(
        "Pascal, 25 Gbit/s, 512", f"{_HOROVOD}: 90 %", "ResNet-101", 103.6, 64, FLOAT_BYTES, 4,
        10e9, 25e9 / 8, (1, 512), 0.90 * 512,
    ),
    # 154 images/s on a P100: TensorFlow's performance benchmarks of 2017.
    Published(
        "Pascal, 25 Gbit/s, 512", f"{_HOROVOD}: 68 %", "VGG-16", 154, 64, FLOAT_BYTES, 4,
        10e9, 25e9 / 8, (1, 512), 0.68 * 512,
    ),
    Published(
        "Pascal, 25 Gbit/s, 128", f"{_HOROVOD}: 79 %", "VGG-16", 154, 64, FLOAT_BYTES, 4,
        10e9, 25e9 / 8, (1, 128), 0.79 * 128,
    ),
)  # fmt: skip


# --- runs of our own -----------------------------------------------------------------------------

OWN = (("cifar_resnet14", 32, 32), ("timm:resnet18", 64, 8))  # network, side, images of a rank
ROUNDS, STEPS = 7, 5


def median_seconds(run: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Return the median of a few, after one that is not counted."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def steps_of(name: str, side: int, images: int) -> tuple[Callable[[], None], int]:
    """Return what runs STEPS steps of a training on this rank, and the bytes of its gradients."""
    torch.manual_seed(0)
    batch = {"image": torch.randn(images, 3, side, side), "label": torch.arange(images) % 10}
    task = DistillationTask(models.build(name, 10))
    engine = build_engine(task, Optimizer(lr=1e-3), micro_batch=images, zero_stage=1)

    def run() -> None:
        for _ in range(STEPS):
            engine.backward(engine(batch)["loss"])
            engine.step()

    return run, FLOAT_BYTES * sum(p.numel() for p in task.parameters())


def own_rank(process: int, world: int, folder: str) -> None:
    """Measure steps and sums in one of two processes, and write the medians.

    In a world of one rank each process is a training of its own.
    """
    rank = process if world > 1 else 0
    os.environ.update(GLOO_SOCKET_IFNAME="lo", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    store = f"file://{folder}/{world}" + ("" if world > 1 else f"-{process}")
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    found = {}
    for name, side, images in OWN:
        run, size = steps_of(name, side, images)
        gradients = torch.zeros(size // FLOAT_BYTES)
        found[name] = {
            "bytes": size,
            "step_s": median_seconds(run) / STEPS,
            "sum_s": median_seconds(lambda g=gradients: dist.all_reduce(g)) if world > 1 else 0.0,
        }
    Path(folder, f"{world}-{process}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def measure_own() -> list[dict[str, Any]]:
    """Compare two ranks with what trainings of one rank and the sum of the gradients predict."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2):
            mp.start_processes(own_rank, args=(world, folder), nprocs=world, start_method="spawn")
            ranks = [
                json.loads(Path(folder, f"{world}-{r}.json").read_text()) for r in range(world)
            ]
            results[world] = ranks
    rows = []
    for name, _, images in OWN:
        alone = max(each[name]["step_s"] for each in results[1])
        both = max(rank[name]["step_s"] for rank in results[2])
        exchange = max(rank[name]["sum_s"] for rank in results[2])
        hidden = NO_OVERLAP * BACKWARD * alone
        predicted = alone + straggling_time(alone, 2) + max(0.0, exchange - hidden)
        rows.append(
            {
                "network": name,
                "images": images,
                "one_rank_ms": 1e3 * alone,
                "sum_ms": 1e3 * exchange,
                "predicted_ms": 1e3 * predicted,
                "measured_ms": 1e3 * both,
                "off": predicted / both - 1,
            }
        )
    return rows


# --- all of it -----------------------------------------------------------------------------------


def run() -> dict[str, Any]:
    """Predict what was published, and measure."""
    published = [
        {
            "what": row.what,
            "network": row.network,
            "source": row.source,
            "gpus": row.gpus,
            "published": row.speed_up,
            "predicted": row.predicted(),
            "off": row.predicted() / row.speed_up - 1,
        }
        for row in PUBLISHED
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": this_machine(),
        "load_average": os.getloadavg()[0],
        "published": published,
        "own": measure_own(),
    }


def show(result: dict[str, Any]) -> None:
    """Print both tables."""
    table = Table(title="Speed-up, published and by the model")
    for name in ("machines", "network", "GPUs", "published", "model", "off"):
        table.add_column(name, justify="left" if name in ("machines", "network") else "right")
    for row in result["published"]:
        table.add_row(
            row["what"],
            row["network"],
            " to ".join(map(str, row["gpus"])),
            f"{row['published']:.1f}",
            f"{row['predicted']:.1f}",
            f"{row['off']:+.0%}",
        )
    Console(width=120).print(table)
    own = Table(title="A step on two ranks of this machine, one thread each, ms")
    for name in ("network", "one rank", "sum of gradients", "model", "measured", "off"):
        own.add_column(name, justify="left" if name == "network" else "right")
    for row in result["own"]:
        cells = (row[key] for key in ("one_rank_ms", "sum_ms", "predicted_ms", "measured_ms"))
        own.add_row(row["network"], *(f"{cell:.1f}" for cell in cells), f"{row['off']:+.0%}")
    Console(width=120).print(own)


def plot(path: Path) -> None:
    """Draw what was published against the model, and ResNet-50 on the machines that it knows."""
    figure, (checks, curves) = plt.subplots(1, 2, figsize=(9.5, 4.2))
    checks.fill_between([0.6, 1], [0.51, 0.85], [0.69, 1.15], alpha=0.15, label="within 15 %")
    checks.plot([0.6, 1], [0.6, 1], color="gray", linewidth=0.8)
    for row, marker in zip(PUBLISHED, "ov^sDPXd", strict=True):
        few, many = row.gpus
        published, predicted = (speed * few / many for speed in (row.speed_up, row.predicted()))
        label = f"{row.network}, {row.what.partition(',')[0]}, {few} to {many}"
        checks.plot(published, predicted, marker, label=label)
    checks.set(
        xlabel="published share of perfect scaling",
        ylabel="by the model",
        xlim=(0.6, 1),
        ylim=(0.6, 1),
    )
    checks.legend(fontsize=6, loc="upper left")
    macs, parameters, layers = NETWORKS["ResNet-50"]
    work = Work(macs, 0, layers, 0, parameters * FLOAT_BYTES)
    for kind in MACHINES.values():
        alone = step_time(work, kind, gpus=1, images=128).total
        shares = [alone / step_time(work, kind, gpus=n, images=128).total for n in GPUS_SHOWN]
        curves.plot(GPUS_SHOWN, shares, marker="o", markersize=3, label=kind.name)
    curves.set(
        xscale="log",
        xlabel="GPUs",
        ylabel="share of perfect scaling",
        ylim=(0.6, 1),
        title="ResNet-50, 128 images a GPU",
    )
    curves.set_xticks(GPUS_SHOWN, [str(n) for n in GPUS_SHOWN])
    curves.minorticks_off()
    curves.legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, draw, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--plot", type=Path, help="file to draw the efficiency to")
    arguments = parser.parse_args()
    result = run()
    show(result)
    if arguments.plot is not None:
        plot(arguments.plot)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
