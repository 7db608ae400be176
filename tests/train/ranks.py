"""Processes that are ranks of a group, and what those of test_two_ranks.py do."""

import json
import multiprocessing
import os
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import CLASSES, TinyLoader, TinyTask, images
from torch import Tensor

from sbf_dist.errors import UserError
from sbf_dist.files import sha256
from sbf_dist.layers import SBFConv2d
from sbf_dist.settings import Optimizer
from sbf_dist.train import checkpoint
from sbf_dist.train.engine import build_engine
from sbf_dist.train.evaluate import accuracy, predict, synchronise_batchnorm
from sbf_dist.train.loop import Every, LogRecord, fit
from sbf_dist.train.manifest import FileEntry
from sbf_dist.train.resharding import whole_state

DIGESTS = {"recipe": "r1"}
OPTIMIZERS = {
    "sgd": Optimizer(lr=0.05, weight_decay=1e-3, clip=5.0),
    "adamw": Optimizer(name="adamw", lr=0.05, weight_decay=1e-3),
    "unclipped": Optimizer(lr=0.05, weight_decay=1e-3),
}


def run(rank_main: Callable[[Path], Any], folder: Path, world_size: int) -> list[Any]:
    """Run rank_main(folder) on every rank of a gloo group; what each rank returned."""
    for left in folder.glob("*.result"):
        left.unlink()
    (folder / "store").unlink(missing_ok=True)
    arguments = (rank_main, str(folder), world_size)
    # Forked from a process that has loaded what takes seconds to load, and has no threads yet.
    multiprocessing.set_forkserver_preload(["tests.train.preloaded"])
    mp.start_processes(_rank, args=arguments, nprocs=world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.result") for rank in range(world_size)]


def _rank(rank: int, rank_main: Callable[[Path], Any], folder: str, world_size: int) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    torch.save(rank_main(Path(folder)), Path(folder, f"{rank}.result"))
    dist.destroy_process_group()
    # Not by way of the interpreter's shutdown: Python 3.11 ends a thread that waits for its lock
    # there, and where that is one of gloo's, giving back a tensor, C++ aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def make_engine(
    zero_stage: int = 1,
    precision: str = "fp32",
    accumulation: int = 1,
    optimizer: str = "sgd",
    skip_bad_steps: int = 0,
    ema: float | None = None,
) -> Any:
    torch.manual_seed(dist.get_rank())  # the ranks must agree although they begin apart
    return build_engine(
        TinyTask(),
        OPTIMIZERS[optimizer],
        micro_batch=16,
        accumulation=accumulation,
        zero_stage=zero_stage,
        precision=precision,  # type: ignore[arg-type]
        skip_bad_steps=skip_bad_steps,
        ema=ema,
    )


def make_loader() -> TinyLoader:
    return TinyLoader(dist.get_rank(), dist.get_world_size())


def train(engine: Any, loader: Any, start: int, steps: int, **options: Any) -> list[float]:
    losses: list[float] = []
    fit(
        engine,
        loader,
        steps=steps,
        start_step=start,
        lr_at=lambda step: 0.05,
        log=Every(1, lambda record: losses.append(record.parts["loss"])),
        **options,
    )
    return losses


def _weights(engine: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in engine.module.parameters()])


def _buffers(engine: Any) -> Tensor:
    return torch.cat([b.flatten() for b in engine.module.buffers()])


def _go_on_with_fixed_statistics(folder: Path, optimizer: str, batch_size: int) -> Tensor:
    """Four more steps from folder/optimizer; batch norm does not depend on who has which image."""
    engine = make_engine(optimizer=optimizer)
    restored = checkpoint.load(engine, folder / optimizer, digests=DIGESTS)
    synchronise_batchnorm(engine.module)
    engine.module.student[1].eval()
    loader = TinyLoader(dist.get_rank(), dist.get_world_size(), batch_size)
    loader.load_state_dict(restored.loader_state)
    train(engine, loader, restored.step, restored.step + 4)
    return _weights(engine)


def save_for_other_ranks(folder: Path) -> dict[str, Tensor]:
    weights = {}
    for optimizer in ("sgd", "adamw"):
        engine, loader = make_engine(optimizer=optimizer), make_loader()
        engine.reads = {"lr": 0.1, "seed": 0, "epochs": 3}
        train(engine, loader, 0, 6)
        state = loader.state_dict()
        checkpoint.save(engine, folder / optimizer, step=6, loader_state=state, digests=DIGESTS)
        weights[optimizer] = _go_on_with_fixed_statistics(folder, optimizer, 16)
    return weights


def train_save_and_go_on(folder: Path) -> dict[str, Any]:
    engine, loader = make_engine(ema=0.9), make_loader()
    answer: dict[str, Any] = {"mlflow": "mlflow" in sys.modules}
    answer["losses"] = train(engine, loader, 0, 12)
    checkpoint.save(
        engine, folder / "saved", step=12, loader_state=loader.state_dict(), digests=DIGESTS
    )
    draws = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    answer["more_losses"] = train(engine, loader, 12, 16)
    answer["weights"] = _weights(engine)
    answer["buffers"] = _buffers(engine)
    answer["averages"] = whole_state(engine, averaged=True)

    never, loader = make_engine(ema=0.9), make_loader()
    train(never, loader, 0, 16)
    answer["weights_unsaved"] = _weights(never)
    answer["buffers_unsaved"] = _buffers(never)
    answer["averages_unsaved"] = whole_state(never, averaged=True)

    again, loader = make_engine(ema=0.9), make_loader()
    restored = checkpoint.load(again, folder / "saved", digests=DIGESTS)
    loader.load_state_dict(restored.loader_state)
    answer["restored"] = restored.step
    redrawn = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    answer["same_draws"] = draws == redrawn
    answer["more_losses_again"] = train(again, loader, restored.step, 16)
    answer["weights_again"] = _weights(again)
    answer["buffers_again"] = _buffers(again)
    answer["averages_again"] = whole_state(again, averaged=True)
    return answer


def batchnorm_and_accuracy(_: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    task = TinyTask()
    norm = task.student[1]
    averages = {
        "student.1.running_mean": torch.arange(8.0) * (1 + 3 * rank),
        "student.1.running_var": torch.arange(8.0) + 1 + rank,
    }
    synchronise_batchnorm(task, averages)
    with torch.no_grad():
        norm.running_mean.copy_(torch.arange(8.0) * (1 + 3 * rank))
        norm.running_var.copy_(torch.arange(8.0) + 1 + rank)
    before = norm.running_mean.clone(), norm.running_var.clone()
    synchronise_batchnorm(task)
    after = norm.running_mean.clone(), norm.running_var.clone()

    torch.manual_seed(0)
    student = TinyTask().student
    ids = torch.arange(40)
    shares = [ids[:33], ids[33:33]] if rank == 0 else [ids[33:]]  # uneven, and an empty batch
    batches = [images(share) for share in shares if len(share)]
    if rank == 1:
        batches[0]["label"][-1] = -1
    scores = accuracy(student, batches, "cpu")
    everything = images(ids[:39])
    alone = predict(student, [everything], "cpu")
    return {
        "before": before,
        "after": after,
        "averages": tuple(averages.values()),
        "scores": scores.__dict__,
        "training_mode_kept": student.training,
        "probabilities": alone.probabilities,
        "labels": everything["label"],
        "classes": CLASSES,
    }


def nothing_to_evaluate_on_rank_1(_: Path) -> dict[str, Any]:
    student = TinyTask().student
    mine = [images(torch.arange(10))] if dist.get_rank() == 0 else []
    return accuracy(student, mine, "cpu").__dict__


def an_sbf_layer_at_stage_3(_: Path) -> dict[str, Any]:
    """Losses of a student with a rebuilt layer at ZeRO 0 and 3, and its weights, whole."""
    answer = {}
    for stage in (0, 3):
        torch.manual_seed(0)
        task = TinyTask()
        task.student[0] = SBFConv2d(3, 8, 3, range(4), [[0, 1], [1, 2], [2, 3], [3, 0]], padding=1)
        engine = build_engine(task, Optimizer(lr=0.05), micro_batch=16, zero_stage=stage, ema=0.5)
        losses = train(engine, make_loader(), 0, 4)
        answer[stage] = {
            "losses": losses,
            "state": whole_state(engine),
            "averaged": whole_state(engine, averaged=True),
        }
    return answer


def other_stages_and_precisions(folder: Path) -> dict[str, list[float]]:
    losses = {}
    for stage, precision in ((0, "fp32"), (2, "bf16"), (3, "fp32")):
        engine = make_engine(stage, precision)
        name = f"zero {stage} {precision}"
        losses[name] = train(engine, make_loader(), 0, 12)
        saved = folder / name
        checkpoint.save(engine, saved, step=12, loader_state={}, digests=DIGESTS)
        again = make_engine(stage, precision)
        checkpoint.load(again, saved, digests=DIGESTS)
    return losses


def where_the_time_goes(_: Path) -> dict[int, dict[str, float]]:
    seconds = {}
    for stage in (0, 1, 2, 3):
        records: list[LogRecord] = []
        fit(
            make_engine(stage),
            make_loader(),
            steps=3,
            lr_at=lambda step: 0.05,
            log=Every(None, records.append),
        )
        seconds[stage] = records[-1].seconds
    return seconds


def accumulated_equals_whole(_: Path) -> dict[str, Tensor]:
    """Without batch norm in training mode, two half batches make the step of a whole one."""
    whole, halves = make_engine(), make_engine(accumulation=2)
    for engine, size in ((whole, 16), (halves, 8)):
        engine.module.student[1].eval()
        train(engine, TinyLoader(dist.get_rank(), dist.get_world_size(), size), 0, 4)
    return {"whole": _weights(whole), "halves": _weights(halves)}


def load_on_one_rank(folder: Path) -> dict[str, Any]:
    weights = {name: _go_on_with_fixed_statistics(folder, name, 32) for name in ("sgd", "adamw")}
    return {
        "weights": weights,
        "others": _refusals(folder / "sgd"),
        "refusal": _load_with_code_inside(make_engine(), folder / "sgd"),
    }


def _refusals(folder: Path) -> dict[str, str]:
    """What is said of a checkpoint of ZeRO stage 1 with SGD by other trainings."""
    wider = TinyTask()
    wider.student[5] = torch.nn.Linear(32, 9)
    engines = {
        "optimizer": make_engine(optimizer="adamw"),
        "stage": make_engine(2),
        "network": build_engine(wider, OPTIMIZERS["sgd"], micro_batch=16),
        "recipe": make_engine(),
    }
    engines["recipe"].reads = {"lr": 0.2, "seed": 0}
    answers = {}
    for name, engine in engines.items():
        digests = {"recipe": "r2"} if name == "recipe" else DIGESTS
        try:
            checkpoint.load(engine, folder, digests=digests)
        except UserError as error:
            answers[name] = str(error)
    return answers


class _RunsCode:
    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._proof,))


def _load_with_code_inside(engine: Any, folder: Path) -> str:
    """Load a checkpoint whose manifest is right about a file that would run code."""
    shard = folder / "deepspeed/state/mp_rank_00_model_states.pt"
    torch.save({"module": _RunsCode(folder / "code-ran")}, shard)
    assert zipfile.is_zipfile(shard)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = FileEntry(size=shard.stat().st_size, sha256=sha256(shard))
    manifest["files"][shard.relative_to(folder).as_posix()] = entry.model_dump()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        checkpoint.load(engine, folder, digests=DIGESTS)
    except UserError as error:
        return str(error)
    return "it was loaded"
