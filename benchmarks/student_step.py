"""A training step of the SBF student beside one of the dense network, in plain PyTorch.

    python benchmarks/student_step.py --json benchmarks/results/student-step.json

Same batches, optimizer and threads; the student has half the multiply-adds, every layer shrunk by
the same share. Steps of both take turns and medians are compared, so that a change of the speed of
the machine meets both.
"""

import argparse
import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import interleaved_medians, machine, pin_malloc
from torch import nn
from torch.nn import functional as F

from launchers.estimate.student import even_student
from sbf_dist import models
from sbf_dist.compression.cost import count
from sbf_dist.recipe import Compress

# Network, side of the images in pixels, images of a step.
CASES = (
    ("timm:resnet18", 64, 16),
    ("timm:resnet50", 64, 16),
    ("torchvision:vgg11_bn", 64, 16),
    ("cifar_resnet14", 32, 64),
)
BUDGET = 0.5


def stepper(network: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """Return what trains a network by a step."""
    labels = torch.arange(len(images)) % 10
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    network.train()

    def step() -> None:
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare(name: str, side: int, batch: int, rounds: int) -> dict[str, Any]:
    """Time both networks of a case."""
    torch.manual_seed(0)
    shape = (3, side, side)
    dense = models.build(name, 10)
    student = even_student(dense, Compress(teacher="dense", macs=BUDGET), shape)
    images = torch.randn(batch, *shape).to(memory_format=torch.channels_last)
    calls = {
        kind: stepper(network.to(memory_format=torch.channels_last), images)
        for kind, network in (("dense", dense), ("sbf", student))
    }
    times = interleaved_medians(calls, rounds=rounds, repeats=2)
    share = count(student, shape).macs / count(dense, shape).macs
    return {
        "network": name,
        "side": side,
        "batch": batch,
        "macs": round(share, 3),
        "dense_ms": round(times["dense"], 2),
        "sbf_ms": round(times["sbf"], 2),
        "ratio": round(times["sbf"] / times["dense"], 3),
    }


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    options = parser.parse_args()
    pin_malloc()
    torch.set_num_threads(options.threads)
    rows = []
    table = Table("network", "side", "images", "MACs", "dense ms", "SBF ms", "ratio")
    for case in CASES:
        rows.append(compare(*case, options.rounds))
        table.add_row(*(str(value) for value in rows[-1].values()))
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
