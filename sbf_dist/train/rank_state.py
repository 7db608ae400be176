"""What each rank of a training has for itself, and a checkpoint keeps for each.

That is: where its images are, its random states, and the batch norm statistics of its own images.
"""

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from sbf_dist.errors import UserError
from sbf_dist.train.evaluate import batchnorm_statistics, synchronise_batchnorm

_STATISTICS, _AVERAGES = "batchnorm/", "average/"  # begin names in the tensors' files


@contextmanager
def shared_statistics(engine: Any) -> Iterator[dict[str, Tensor]]:
    """Let batch norms have the statistics of all ranks, in the context; gives this rank's own."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield {}
        return
    shared = _statistics(engine)
    own = {name: tensor.clone() for name, tensor in shared.items()}
    synchronise_batchnorm(engine.module)
    if engine.average is not None:
        engine.average.synchronise()
    try:
        yield own
    finally:
        _put_statistics(engine, own)


def _statistics(engine: Any) -> dict[str, Tensor]:
    """Batch norm statistics of an engine, and their moving averages, by names of their own."""
    names = batchnorm_statistics(engine.module)
    buffers = dict(engine.module.named_buffers())
    found = {f"{_STATISTICS}{name}": buffers[name] for name in names}
    averages = {} if engine.average is None else engine.average.buffers
    return found | {f"{_AVERAGES}{name}": averages[name] for name in names if name in averages}


def _put_statistics(engine: Any, own: Mapping[str, Tensor]) -> None:
    for name, tensor in _statistics(engine).items():
        if name in own:
            tensor.copy_(own[name])


def write_rank_state(
    folder: Path,
    loader_state: Mapping[str, Any],
    written: Mapping[str, Any],
    statistics: Mapping[str, Tensor],
) -> None:
    """Write the files of this rank: `statistics` are its own, of shared_statistics()."""
    folder.mkdir(parents=True)
    version, integers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "written": dict(written),
        "loader": dict(loader_state),
        "python_random": [version, list(integers), gauss],
        "numpy_random": [name, position, has_gauss, cached],
    }
    (folder / f"{_rank():05d}.json").write_text(json.dumps(state))
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, np.int64)),
        **{name: tensor.contiguous() for name, tensor in statistics.items()},
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / f"{_rank():05d}.safetensors")


def read_loader_state(folder: Path, rank: int) -> dict[str, Any]:
    """Where the images of a rank were. UserError if the file is missing or damaged."""
    state = read_state(folder, rank).get("loader")
    if not isinstance(state, dict):
        raise _damaged(folder, rank, "loader")
    return state


def restore(folder: Path, engine: Any) -> None:
    """Put back what was this rank's own: random states, batch norm statistics of its images."""
    rank = _rank()
    state, tensors = read_state(folder, rank), load_file(folder / f"{rank:05d}.safetensors")
    version, integers, gauss = state["python_random"]
    random.setstate((version, tuple(integers), gauss))
    name, position, has_gauss, cached = state["numpy_random"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    _put_statistics(engine, tensors)


def read_state(folder: Path, rank: int) -> dict[str, Any]:
    """What a rank noted beside its tensors. UserError if the file is missing or damaged."""
    path = folder / f"{rank:05d}.json"
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no JSON: {error}"
        raise UserError(
            f"checkpoint {path}: cannot be read: {reason}; use an earlier checkpoint"
        ) from error
    if not isinstance(state, dict):
        raise _damaged(folder, rank, "it holds no object")
    return state


def _damaged(folder: Path, rank: int, what: str) -> UserError:
    path = folder / f"{rank:05d}.json"
    return UserError(f"checkpoint {path}: is damaged: {what}; use an earlier checkpoint")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
