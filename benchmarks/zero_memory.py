"""Memory of a rank at each ZeRO stage: weights, gradients, optimizer state, communication buffers.

    python benchmarks/zero_memory.py --json benchmarks/results/zero-memory.json

Measured: ResNet-50 in fp32, without accumulation, on two ranks of this machine, by the storages of
all tensors that are alive: after a step (weights, optimizer state), and between a backward pass and
the step (gradients). Computed for 2, 8 and 64 ranks from the sizes of the parameters alone; the
measured numbers say how far that is right. Left out: activations, which depend on the batch and not
on the stage, and gradients on their way between ranks, up to one copy of all at each stage.
"""

import argparse
import datetime
import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from timing import machine
from torch import Tensor

from launchers.estimate.memory import state_memory
from sbf_dist import models
from sbf_dist.distill.task import DistillationTask
from sbf_dist.settings import Optimizer
from sbf_dist.train.engine import build_engine
from sbf_dist.train.resharding import optimized, state_of

MODEL = "timm:resnet50"
OPTIMIZERS = ("sgd", "adamw")
STAGES = (0, 1, 2, 3)
RANKS = (2, 8, 64)
KINDS = ("weights", "gradients", "optimizer")


def computed(stage: int, optimizer: str, sizes: Sequence[int], ranks: int) -> dict[str, int]:
    """Bytes of a rank, as `sbf run --dry-run` computes them."""
    memory = state_memory(stage, optimizer, sizes, ranks)
    return {kind: getattr(memory, kind) for kind in KINDS}


def measure(stage: int, optimizer: str) -> dict[str, int]:
    """Bytes of this rank."""
    torch.manual_seed(0)
    batch = {"image": torch.randn(2, 3, 64, 64), "label": torch.tensor([0, 1])}
    before = _storages(_alive())
    task = DistillationTask(models.build(MODEL, 1000))
    settings = Optimizer(name=optimizer, lr=1e-3)  # type: ignore[arg-type]
    engine = build_engine(task, settings, micro_batch=2, zero_stage=stage)
    for _ in range(2):
        engine.backward(engine(batch)["loss"])
        engine.step()
    resting = {k: v for k, v in _storages(_alive()).items() if k not in before}
    state = _storages(
        value
        for tensor in optimized(engine)
        for value in state_of(engine, tensor).values()
        if torch.is_tensor(value)
    )
    others = _storages([*engine.module.buffers(), *_buckets(engine, stage)])
    engine.backward(engine(batch)["loss"])
    gradients = _storages(_gradients(engine, stage))
    engine.step()
    known = state.keys() | others.keys() | gradients.keys()
    return {
        "weights": sum(size for place, size in resting.items() if place not in known),
        "gradients": sum(gradients.values()),
        "optimizer": sum(state.values()),
    }


def _gradients(engine: Any, stage: int) -> Iterator[Tensor]:
    yield from (p.grad for p in engine.module.parameters() if p.grad is not None)
    if stage:
        for group in engine.optimizer.averaged_gradients.values():
            yield from (gradient for gradient in group or [] if gradient is not None)


def _buckets(engine: Any, stage: int) -> Iterator[Tensor]:
    """Where gradients are on their way, which stage 3 keeps between steps."""
    if stage == 3:
        yield from (bucket.buffer for bucket in engine.optimizer.ipg_buckets.values())


def _alive() -> Iterable[Tensor]:
    gc.collect()
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            yield thing


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def _rank(rank: int, folder: str) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {f"{stage} {name}": measure(stage, name) for stage in STAGES for name in OPTIMIZERS}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def run() -> dict[str, Any]:
    """Measure both ranks, and compute."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, args=(folder,), nprocs=2, start_method="spawn")
        measured = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]
    sizes = [p.numel() for p in models.build(MODEL, 1000).parameters()]
    rows = []
    for stage in STAGES:
        for name in OPTIMIZERS:
            found = [rank[f"{stage} {name}"] for rank in measured]
            rows.append(
                {
                    "stage": stage,
                    "optimizer": name,
                    "measured": {kind: max(rank[kind] for rank in found) for kind in KINDS},
                    "computed": {ranks: computed(stage, name, sizes, ranks) for ranks in RANKS},
                }
            )
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "model": MODEL,
        "parameters": sum(sizes),
        "rows": rows,
    }


def show(result: dict[str, Any]) -> None:
    """Print the measured and the computed megabytes of a rank."""
    table = Table(title=f"{MODEL}, MB per rank: weights + gradients + optimizer state")
    for name in ("ZeRO", "optimizer", "2 ranks, measured", *(f"{n}, computed" for n in RANKS)):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        cells = [row["measured"], *row["computed"].values()]
        table.add_row(str(row["stage"]), row["optimizer"], *map(_megabytes, cells))
    Console(width=140).print(table)


def _megabytes(kinds: dict[str, int]) -> str:
    parts = " + ".join(f"{kinds[kind] / 1e6:.0f}" for kind in KINDS)
    return f"{parts} = {sum(kinds.values()) / 1e6:.0f}"


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    result = run()
    show(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
