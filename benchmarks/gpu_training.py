"""Training steps on a CUDA device: ours beside a bare PyTorch loop, SBF and pruned beside dense.

    python benchmarks/gpu_training.py --json benchmarks/results/gpu-training.json

ResNet-50, 224 px, bf16 (autocast), channels_last, SGD with momentum, images that lie in the
device's memory. Ours: DeepSpeed's engine at ZeRO 1 and the loop of a run, a record every ten
steps. Bare: torch.optim.SGD (fused) and torch.autocast. SBF students have half the
multiply-adds, every layer shrunk by the same share, kept channels a multiple of 1, 8 or 32
(compress.round_to). For comparison the same multiply-adds reached by removing channels inside the
blocks: a share of each layer by the norm of the filters, and 40 of 64, 80 of 128, and so on, which
are multiples of 8. Medians over rounds. `forward`: inference in half, as `sbf_dist.optimize`
prepares the networks.
"""

import argparse
import copy
import datetime
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from gpu_build import require_device
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from launchers.estimate.student import even_student
from sbf_dist import models, optimize
from sbf_dist.compression.cost import count
from sbf_dist.distill.task import DistillationTask
from sbf_dist.peers.pruned import prune
from sbf_dist.recipe import Compress
from sbf_dist.settings import Optimizer
from sbf_dist.train.engine import build_engine
from sbf_dist.train.loop import Every, fit

MODEL, CLASSES, SIDE, BUDGET = "timm:resnet50", 1000, 224, 0.5
DEVICE = "cuda"
RATE, MOMENTUM = 1e-4, 0.9
WARM_STEPS, STEPS = 10, 20  # of a turn: a multiple of what lies between two records
Loop = Callable[[int], None]  # trains for so many steps


def networks() -> dict[str, nn.Module]:
    """Build all networks, on the CPU."""
    torch.manual_seed(0)
    dense = models.build(MODEL, CLASSES).eval()
    shape = (3, SIDE, SIDE)
    students = {
        f"SBF, multiples of {unit}": even_student(
            dense, Compress(teacher="dense", macs=BUDGET, round_to=unit), shape
        )
        for unit in (1, 8, 32)
    }
    pruned = prune(dense, BUDGET, torch.randn(8, *shape), importance="l1", everywhere=False)
    narrow = torchvision.models.resnet50(width_per_group=40)
    return {
        "dense": dense,
        **students,
        "channels removed, multiples of 8": narrow,
        "channels removed": pruned,
    }


def bare_loop(network: nn.Module, batch: dict[str, Tensor]) -> Loop:
    """Train as a short script would."""
    network = network.to(DEVICE, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=MOMENTUM, fused=True)

    def train(steps: int) -> None:
        for _ in range(steps):
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = F.cross_entropy(network(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return train


def our_loop(network: nn.Module, batch: dict[str, Tensor]) -> Loop:
    """Train as a worker of a run does."""
    settings = Optimizer(lr=RATE, momentum=MOMENTUM)
    task = DistillationTask(network.to(DEVICE).train())
    engine = build_engine(task, settings, micro_batch=len(batch["image"]), precision="bf16")

    def train(steps: int) -> None:
        fit(
            engine,
            itertools.repeat(batch),
            steps=steps,
            lr_at=lambda step: RATE,
            log=Every(10, lambda record: None),
        )

    return train


LOOPS: dict[str, Callable[[nn.Module, dict[str, Tensor]], Loop]] = {
    "bare": bare_loop,
    "ours": our_loop,
}


def timed(train: Loop, rounds: int) -> tuple[float, float]:
    """Return median milliseconds of a step and the gigabytes at most allocated."""
    torch.cuda.reset_peak_memory_stats()
    train(WARM_STEPS)
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        train(STEPS)
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start) / STEPS)
    return statistics.median(times), torch.cuda.max_memory_allocated() / 1e9


def forward_ms(network: nn.Module, images: Tensor, rounds: int) -> float:
    """Return the median milliseconds of a batch."""
    prepared = optimize(network.eval().to(DEVICE)).half()
    prepared = prepared.to(memory_format=torch.channels_last)
    images = images.half()

    @torch.inference_mode()
    def run(steps: int) -> None:
        for _ in range(steps):
            prepared(images)

    return timed(run, rounds)[0]


def main() -> None:
    """Measure, print, and write the JSON file after each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="with torch.compile as well")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    options = parser.parse_args()
    require_device("benchmarks/gpu_training.py")
    torch.backends.cudnn.benchmark = True
    shape = (3, SIDE, SIDE)
    images = torch.randn(options.batch, *shape, device=DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(options.batch, device=DEVICE) % CLASSES
    batch = {"image": images, "label": labels, "labelled": torch.ones_like(labels).bool()}
    result: dict[str, Any] = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "model": MODEL,
        "batch": options.batch,
        "rows": [],
    }
    base: float | None = None
    for name, network in networks().items():
        macs = count(network, shape).macs / 1e9
        for compiled in (False, True) if options.compiled else (False,):
            for loop, make in LOOPS.items():
                own = copy.deepcopy(network)
                if compiled:
                    own.compile()
                ms, memory = timed(make(own, batch), options.rounds)
                base = base or ms
                result["rows"].append(
                    {
                        "network": name,
                        "gmacs": round(macs, 2),
                        "loop": loop,
                        "compiled": compiled,
                        "step_ms": round(ms, 2),
                        "images_per_s": round(1000 * options.batch / ms),
                        "of_dense_bare": round(ms / base, 3),
                        "memory_gb": round(memory, 2),
                    }
                )
                print(result["rows"][-1], flush=True)
                if options.json is not None:
                    options.json.write_text(json.dumps(result, indent=1) + "\n")
        ms = forward_ms(copy.deepcopy(network), images, options.rounds)
        result.setdefault("forward_ms", {})[name] = round(ms, 2)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    table = Table(*result["rows"][0])
    for row in result["rows"]:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=120).print(table)
    print(f"forward, half, ms: {result['forward_ms']}")


if __name__ == "__main__":
    main()
