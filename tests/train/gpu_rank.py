"""What the only rank of test_training_on_gpu.py does, in a process whose DeepSpeed runs on CUDA."""

import itertools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ranks
import torch
import torch.multiprocessing as mp
from tiny import CLASSES, TinyLoader, TinyTask
from torch import Tensor, nn

from sbf_dist.layers import SBFConv2d
from sbf_dist.settings import Optimizer
from sbf_dist.train import checkpoint
from sbf_dist.train.engine import build_engine
from sbf_dist.train.loop import Every, LogRecord, fit

DEVICE = "cuda"
STEPS = 12
STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16", "fp16")
SETTINGS = Optimizer(lr=0.05, weight_decay=1e-3, clip=5.0)


def run(rank_main: Callable[[Path], Any], folder: Path) -> Any:
    """Run rank_main(folder) in a process of its own; what it returned."""
    mp.start_processes(_rank, args=(rank_main, str(folder)), nprocs=1, start_method="spawn")
    return torch.load(folder / "result", weights_only=True)


def _rank(_: int, rank_main: Callable[[Path], Any], folder: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.save(rank_main(Path(folder)), Path(folder, "result"))
    sys.stdout.flush()
    os._exit(0)


def sbf_task() -> TinyTask:
    """Return a task whose convolution is an SBF layer."""
    task = TinyTask()
    sources = [[0, 1], [1, 2], [2, 3], [3, 0]]
    task.student[0] = SBFConv2d(3, 8, 3, range(4), sources, padding=1)
    return task


def make_engine(task: nn.Module | None = None, **options: Any) -> Any:
    if task is None:
        torch.manual_seed(3)
        task = TinyTask()
    return build_engine(task.to(DEVICE), SETTINGS, micro_batch=16, **options)


def train(engine: Any, loader: Any, start: int = 0, steps: int = STEPS) -> list[float]:
    """Return the loss of each step."""
    return ranks.train(engine, loader, start, steps)


def losses(_: Path) -> dict[str, list[float]]:
    """Losses at every ZeRO stage in every precision, of special networks, and on the CPU."""
    found = {}
    for stage, precision in itertools.product(STAGES, PRECISIONS):
        engine = make_engine(zero_stage=stage, precision=precision)
        found[f"{stage} {precision}"] = train(engine, TinyLoader(0, 1))
    for precision in PRECISIONS:
        torch.manual_seed(3)
        engine = make_engine(sbf_task(), precision=precision)
        found[f"SBF {precision}"] = train(engine, TinyLoader(0, 1))
    torch.manual_seed(3)
    normed = nn.SyncBatchNorm.convert_sync_batchnorm(TinyTask())
    found["SyncBatchNorm"] = train(make_engine(normed), TinyLoader(0, 1))
    for name, make in (("compiled", TinyTask), ("compiled SBF", sbf_task)):
        torch.manual_seed(3)
        task = make()
        task.student.compile()
        found[name] = train(make_engine(task), TinyLoader(0, 1))
    return found


def bits_after_resuming(folder: Path) -> dict[str, list[dict[str, Tensor]]]:
    """Weights of a training that was saved half-way, and of one that goes on from there."""
    found = {}
    for stage, precision in itertools.product(STAGES, PRECISIONS):
        name = f"{stage} {precision}"
        options = {"zero_stage": stage, "precision": precision, "ema": 0.9}
        engine, loader = make_engine(**options), TinyLoader(0, 1)
        train(engine, loader, 0, 6)
        state = loader.state_dict()
        checkpoint.save(engine, folder / name, step=6, loader_state=state, digests={})
        train(engine, loader, 6, STEPS)
        again, loader = make_engine(**options), TinyLoader(0, 1)
        restored = checkpoint.load(again, folder / name, digests={})
        loader.load_state_dict(restored.loader_state)
        train(again, loader, restored.step, STEPS)
        found[name] = [_state(engine), _state(again)]
    return found


def _state(engine: Any) -> dict[str, Tensor]:
    from sbf_dist.train.resharding import whole_state

    answer = whole_state(engine) | {
        f"average of {name}": value for name, value in whole_state(engine, averaged=True).items()
    }
    return {name: value.cpu() for name, value in answer.items()}


def waits_for_the_device(_: Path) -> dict[str, list[str]]:
    """Where the host waits for the device in ten steps, at whose end a record is logged."""
    ids = torch.arange(16, device=DEVICE)
    batch = {"image": torch.randn(16, 3, 6, 6, device=DEVICE), "label": ids % CLASSES, "id": ids}
    found = {}
    for stage, precision in itertools.product((0, 1, 2), ("fp32", "bf16")):
        torch.manual_seed(3)
        engine = build_engine(
            TinyTask().to(DEVICE),
            Optimizer(lr=0.05),
            micro_batch=16,
            zero_stage=stage,
            precision=precision,
            ema=0.9,
        )
        waits: list[str] = []

        def begin_to_count(record: LogRecord) -> None:
            torch.cuda.set_sync_debug_mode("warn" if record.step == 20 else "default")

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(
                engine,
                itertools.repeat(batch),
                steps=30,
                lr_at=lambda step: 0.05,
                log=Every(10, begin_to_count),
            )
            waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
        torch.cuda.set_sync_debug_mode("default")
        found[f"{stage} {precision}"] = waits
    return found
