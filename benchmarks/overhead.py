"""A training step of ours beside one of a bare PyTorch loop: same network, batches and threads.

    python benchmarks/overhead.py --json benchmarks/results/overhead.json

Ours: one worker of Ray Train, DeepSpeed's engine, images read by DALI (cached, as small sets are),
a log record every ten steps that goes to MLflow's journal and to the driver. Bare: torch.optim.SGD
on batches that lie in memory. Blocks of both take turns in the same worker, so that a change of
the machine's speed meets both; a step's time is the median over blocks. `saving`: ours, and a
fiftieth of the time until a checkpoint is on the disk, as if nothing of it happened in the
background.
"""

import argparse
import copy
import datetime
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from timing import machine

CASES: dict[str, dict[str, Any]] = {
    "ResNet-18, 224 px, batch 16": {"model": "timm:resnet18", "side": 224, "batch": 16, "block": 4},
    "CIFAR ResNet-14, 32 px, batch 64": {
        "model": "cifar_resnet14",
        "side": 32,
        "batch": 64,
        "block": 50,
    },
}
CHECKPOINT_EVERY = 50
RATE = 1e-3


class Ours:
    """Our loop on one worker: engine, images and journal as a run has them."""

    def __init__(self, case: dict[str, Any], folder: Path) -> None:
        import torch

        from pipelines.index import DataIndex
        from pipelines.joined import JoinedLoader
        from pipelines.loader import TrainLoader
        from pipelines.reader import Reader
        from sbf_dist import models, tracking
        from sbf_dist.distill.task import DistillationTask
        from sbf_dist.settings import Augmentation, Optimizer, View
        from sbf_dist.train.engine import build_engine

        index = DataIndex.load(folder / "index")
        self.block = case["block"]
        self.network = models.build(case["model"], len(index.classes))
        self.engine = build_engine(
            DistillationTask(self.network), Optimizer(lr=RATE), micro_batch=case["batch"]
        )
        loader = TrainLoader(
            index,
            ["labelled"],
            Reader(0, 1, 1, torch.device("cpu"), cache="memory"),
            batch_size=case["batch"],
            view=View(image_size=case["side"], mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
            augmentation=Augmentation(),
            seed=0,
        )
        self.batches = JoinedLoader([loader])
        self.stream = iter(self.batches)
        self.tracker = tracking.attach(folder / "journals")
        self.done = 0

    def train(self) -> None:
        """Train a block of steps."""
        from sbf_dist.train.loop import Every, fit

        end = self.done + self.block
        fit(
            self.engine,
            self.stream,
            steps=end,
            start_step=self.done,
            lr_at=lambda step: RATE,
            log=Every(10, self._log),
        )
        self.done = end

    def _log(self, record: Any) -> None:
        from launchers.on_ray import ray_train

        ray_train.progress({"step": record.step, "steps": record.steps, "parts": record.parts})
        self.tracker.log_metrics(record.parts | record.seconds, record.step)


def bare_loop(network: Any, ready: list[dict[str, Any]], block: int) -> Callable[[], None]:
    """Return a function that trains a block of steps in plain PyTorch."""
    import torch
    from torch.nn import functional as F

    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, nesterov=True)
    batches = itertools.cycle(ready)
    network.train()

    def train() -> None:
        for batch in itertools.islice(batches, block):
            loss = F.cross_entropy(network(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return train


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """Time blocks of steps in turn, on the only worker; seconds of a step, by kind of loop."""
    import torch

    from launchers.on_ray import ray_train
    from launchers.on_ray.checkpoints import Shelf
    from launchers.on_ray.saving import Saving
    from launchers.on_ray.stopping import Stopping

    torch.manual_seed(0)
    case, folder, rounds = config["case"], Path(config["folder"]), config["rounds"]
    ours = Ours(case, folder)
    ready = [next(ours.stream) for _ in range(4)]
    bare = bare_loop(copy.deepcopy(ours.network), ready, case["block"])
    times = _timed({"bare": bare, "ours": ours.train}, rounds, case["block"])

    numbers = itertools.count(1)
    stopping = Stopping(ray_train.listening(), 600.0, folder / "stacks")
    with Saving(Shelf(folder / "checkpoints", "overhead"), stopping) as saving:

        def save() -> None:
            saving.save(
                ours.engine,
                step=next(numbers),
                loader_state=ours.batches.state_dict(),
                digests={"training": "overhead"},
            )
            saving.wait()

        seconds = _timed({"save": save}, max(3, rounds // 4), 1)["save"]
    ours.batches.close()
    return times | {"saving": times["ours"] + seconds / CHECKPOINT_EVERY}


def _timed(loops: dict[str, Callable[[], None]], rounds: int, block: int) -> dict[str, float]:
    """Return the median seconds of a step of each loop; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        for name, loop in loops.items():
            start = time.perf_counter()
            loop()
            if number:
                times[name].append((time.perf_counter() - start) / block)
    return {name: statistics.median(values) for name, values in times.items()}


def run(case: dict[str, Any], rounds: int, folder: Path) -> dict[str, Any]:
    """Index the images, start Ray with one worker and measure there."""
    from launchers.display import Display
    from launchers.images import index_images
    from launchers.on_ray.local_ray import local_ray
    from sbf_dist import tracking
    from sbf_dist.recipe import Data, Workers

    data = Data(source="photos", image_size=case["side"])
    index_images(data, folder, 0, Display()).save(folder / "index")
    workers = Workers(count=1)
    with tracking.start(folder / "run") as tracker, local_ray(1, workers.cpus):
        from launchers.on_ray.attempts import run_workers
        from launchers.on_ray.worker_group import KeptWorkers

        (folder / "journals").symlink_to(tracker.journals.absolute())
        with KeptWorkers(workers) as kept:
            return run_workers(
                measure,
                {"case": case, "folder": str(folder), "rounds": rounds},
                name="overhead",
                storage=folder / "storage",
                logs=folder / "logs",
                kept=kept,
            )


def main() -> None:
    """Measure all cases, print the table and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.cases:
        with tempfile.TemporaryDirectory(prefix="sbf-overhead-") as folder:
            times = run(CASES[name], options.rounds, Path(folder))
        rows.append(
            {
                "case": name,
                **{f"{kind}_ms": round(1e3 * seconds, 2) for kind, seconds in times.items()},
                "ratio": round(times["ours"] / times["bare"], 3),
                "ratio_saving": round(times["saving"] / times["ours"], 3),
            }
        )
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if options.json:
        report = {
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "machine": machine(),
            "threads": 1,
            "rounds": options.rounds,
            "checkpoint_every": CHECKPOINT_EVERY,
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
