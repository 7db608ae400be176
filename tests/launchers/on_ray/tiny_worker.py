"""The workers of test_ray_train.py. Ray's workers import this file."""

import json
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "train"))

import torch
import torch.distributed as dist
from tiny import TinyLoader, TinyTask

from launchers.on_ray import ray_train
from launchers.on_ray.checkpoints import Shelf
from launchers.on_ray.saving import Saving
from launchers.on_ray.stopping import Stopping
from sbf_dist import models
from sbf_dist.errors import UserError
from sbf_dist.settings import Optimizer
from sbf_dist.train import checkpoint
from sbf_dist.train.engine import build_engine
from sbf_dist.train.loop import Annotation, Batch, Every, LogRecord, fit

STEPS = 40
CHECKPOINT_EVERY = 10


def train(config: dict[str, Any]) -> dict[str, Any]:
    """Train; note each sample seen; on rank 1, do config["at"][step] once: raise, or a signal.

    With config["announced"] several workers wait for that file after the first checkpoint; with
    config["seen_at"] they wait after that step's record for the file "seen" of the diary.
    """
    stacks = Path(config["diary"], f"stacks-{dist.get_rank()}.txt")
    stopping = Stopping(ray_train.listening(), config.get("hang_timeout", 600), stacks)
    with Saving(Shelf(Path(config["checkpoints"]), "tiny"), stopping) as saving:
        return _train(config, saving)


def _train(config: dict[str, Any], saving: Saving) -> dict[str, Any]:
    rank, diary = dist.get_rank(), Path(config["diary"])
    torch.manual_seed(rank)
    engine = build_engine(TinyTask(), Optimizer(lr=0.05, weight_decay=5e-4), micro_batch=16)
    loader = TinyLoader(rank, dist.get_world_size())
    start = 0
    if saving.resume is not None:
        restored = checkpoint.load(engine, saving.resume, digests={})
        loader.load_state_dict(restored.loader_state)
        start = restored.step
    logging.getLogger("sbf_dist.test").warning("begins at step %d", start)
    losses = []

    def note(batch: Batch) -> Batch:
        step = int(batch["id"][0]) // 32
        with (diary / f"{rank}.jsonl").open("a") as file:
            print(json.dumps([os.getpid(), step, batch["id"].tolist()]), file=file)
        if "announced" in config and step >= CHECKPOINT_EVERY + 5 and dist.get_world_size() > 1:
            while not Path(config["announced"]).exists():
                time.sleep(0.1)
            time.sleep(1)  # until the announcement has come here
        what = config.get("at", {}).get(str(step))
        done = diary / f"done-{step}"
        if rank == dist.get_world_size() - 1 and what is not None and not done.exists():
            saving.wait()  # so that it is known what is gone on from
            done.touch()
            if what == "raise":
                raise RuntimeError("no luck\nat all")
            os.kill(os.getpid(), what)
        return batch

    def on_log(record: LogRecord) -> None:
        losses.append(record.parts["loss"])
        ray_train.progress(asdict(record))
        while record.step == config.get("seen_at") and not (diary / "seen").exists():
            time.sleep(0.05)

    def on_checkpoint(step: int) -> None:
        state, digests = loader.state_dict(), {"training": "tiny"}
        saving.save(engine, step=step, loader_state=state, digests=digests)

    fit(
        engine,
        loader,
        steps=STEPS,
        start_step=start,
        lr_at=lambda step: 0.05,
        log=Every(5, on_log),
        checkpoint=saving.every(CHECKPOINT_EVERY, on_checkpoint),
        annotate=Annotation(note),
    )
    flat = torch.cat([p.detach().flatten() for p in engine.module.parameters()])
    both = [torch.zeros_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(both, flat)
    return {
        "start": start,
        "losses": losses,
        "weights_equal": torch.equal(both[0], both[-1]),
        "environment": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "TMPDIR")},
    }


def refuse_on_rank_1(config: dict[str, Any]) -> None:
    """Rank 1 finds the user's mistake while rank 0 waits for it."""
    Path(config["diary"], f"tries-of-{dist.get_rank()}-{os.getpid()}").touch()
    if dist.get_rank() == 1:
        raise UserError("batch size 7: must be a multiple of 2")
    dist.barrier()


def build_from_relative_path(config: dict[str, Any]) -> dict[str, Any]:
    """Build the user's network where the driver works."""
    model = models.build(config["model"], 3)
    return {"directory": str(Path.cwd()), "outputs": model.out_features}


def break_down(config: dict[str, Any]) -> None:
    """A bug of ours."""
    raise KeyError(f"no such layer: {config['layer']}")


def pids(config: dict[str, Any]) -> dict[str, Any]:
    """The process of each rank."""
    found: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(found, os.getpid())
    return {"pids": found}


def note_pid(config: dict[str, Any]) -> None:
    """Leave a file with this worker's process number where the driver works."""
    Path(f"begun-{os.getpid()}").touch()


def noted_pids() -> set[int]:
    return {int(path.name.rpartition("-")[2]) for path in Path().glob("begun-*")}
