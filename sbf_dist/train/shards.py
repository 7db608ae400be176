"""DeepSpeed's shards put together, and cut again for another number of ranks; without DeepSpeed.

How a ZeRO stage lays out the numbers of a group of parameters (weights, optimizer state):

    0       nothing is divided
    1, 2    end to end, zeros behind the last, cut into equal parts, one per rank
    3       each parameter by itself, zeros behind it, cut into equal parts; a rank has its parts of
            all parameters end to end

as in deepspeed/utils/zero_to_fp32.py and deepspeed/runtime/zero.
"""

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbf_dist.errors import UserError

Shapes = Mapping[str, torch.Size]  # of the parameters of a group, by name, in their order
State = dict[str, Tensor | float | int]  # of one parameter: "momentum_buffer", "step", and so on

# What engine.save_shards adds to what DeepSpeed saves.
SHARED = "sbf_shared_names"  # of parameters with several names: each further one and the first
NAMES = "sbf_optimizer_names"  # the parameters of each group of the optimizer
EMA_BUFFERS = "sbf_ema_buffers"  # the moving average of batch norm statistics
SCALER = "sbf_gradient_scaler"  # at fp16, what the loss is scaled with
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
EMA = "ema"  # the moving average of the weights, kept with the optimizer's state of a parameter


@dataclass(frozen=True)
class Whole:
    """What the shards of a checkpoint hold, as if nothing had been divided; on the CPU.

    weights    parameters and buffers by name
    optimizer  the state of each trained parameter by name, tensors in the parameter's shape; empty
               where a version before saved at ZeRO stage 0, which noted no names
    counters   DeepSpeed's counts of steps and samples
    ema_buffers  the moving average of batch norm statistics, empty where there is none
    shared     further names of parameters that have several, and the first of each
    scaler     at fp16, the state of what scales the loss
    """

    zero_stage: int
    weights: dict[str, Tensor]
    optimizer: dict[str, State]
    counters: dict[str, int]
    ema_buffers: dict[str, Tensor]
    shared: dict[str, str]
    scaler: dict[str, Any] | None = None

    @property
    def ema(self) -> dict[str, Tensor]:
        """All weights, the moving average for those that have one; empty where none has."""
        averages = {name: state.get(EMA) for name, state in self.optimizer.items()}
        found = {name: value for name, value in averages.items() if isinstance(value, Tensor)}
        if not found:
            return {}
        shared = {name: found[first] for name, first in self.shared.items() if first in found}
        return self.weights | found | shared | self.ema_buffers


def join(stage: int, shapes: Shapes, parts: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors of a group of parameters, of the parts of all ranks at ZeRO stage 1, 2 or 3."""
    found = {}
    offset = 0
    flat = torch.cat(list(parts)) if stage < 3 else None
    for name, shape in shapes.items():
        size = shape.numel()
        if flat is not None:
            values, taken = flat[offset : offset + size], size
        else:
            taken = math.ceil(size / len(parts))
            values = torch.cat([part[offset : offset + taken] for part in parts])[:size]
        found[name] = values.reshape(shape).clone()
        offset += taken
    return found


def cut(stage: int, tensors: Sequence[Tensor], *, rank: int, ranks: int, size: int) -> Tensor:
    """A rank's part, `size` numbers, of the tensors of a group at ZeRO stage 1, 2 or 3."""
    if stage < 3:
        mine = torch.cat([tensor.flatten() for tensor in tensors])[rank * size :][:size]
    else:
        parts = []
        for tensor in tensors:
            length = math.ceil(tensor.numel() / ranks)
            part = tensor.flatten()[rank * length :][:length]
            parts.append(torch.nn.functional.pad(part, (0, length - len(part))))
        mine = torch.cat(parts)
    return torch.nn.functional.pad(mine, (0, size - len(mine)))


def read(folder: Path, ranks: int) -> Whole:
    """Put the shards of a checkpoint that `ranks` ranks wrote together.

    UserError: a file is missing, or holds more than tensors and numbers.
    """
    names = file_names(ranks, None, folder)
    model = [_load(folder / name) for name in names if name.endswith(_MODEL)]
    parts = [_load(folder / name) for name in names if name.endswith(_OPTIMIZER)]
    optimizer = [part["optimizer_state_dict"] for part in parts]
    first = model[0]
    weights, states, stage = dict(first["module"]), _undivided_states(first), 0
    if optimizer:
        stage = int(optimizer[0]["zero_stage"])
        if stage == 3:
            weights = _weights_of_stage_3(model, optimizer)
            base = [part["optimizer_state_dict"]["state"] for part in optimizer]
        else:
            base = [part["base_optimizer_state"]["state"] for part in optimizer]
        for number, shapes in enumerate(first["param_shapes"]):
            own = [part.get(number, {}) for part in base]
            states.update(_states_of_group(stage, shapes, own))
    return Whole(
        zero_stage=stage,
        weights=weights,
        optimizer=states,
        counters={key: first[key] for key in _COUNTERS},
        ema_buffers=first.get(EMA_BUFFERS, {}),
        shared=first.get(SHARED, {}),
        scaler=first.get(SCALER),
    )


def _states_of_group(
    stage: int, shapes: Shapes, parts: Sequence[Mapping[Any, Any]]
) -> dict[str, State]:
    states: dict[str, State] = {name: {} for name in shapes}
    for key, value in parts[0].items():
        if torch.is_tensor(value) and value.ndim > 0:
            joined = join(stage, shapes, [part[key] for part in parts])
            for name, tensor in joined.items():
                states[name][key] = tensor
        else:  # a count of steps, the same for all
            for state in states.values():
                state[key] = value
    return states


def _undivided_states(model: Mapping[str, Any]) -> dict[str, State]:
    if model["optimizer"] is None:  # at ZeRO stage 1, 2 or 3
        return {}
    names = [name for group in model.get(NAMES, []) for name in group]
    return {name: dict(model["optimizer"]["state"].get(i, {})) for i, name in enumerate(names)}


def _weights_of_stage_3(
    model: Sequence[Mapping[str, Any]], optimizer: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Parameters from their parts, in the order of the module; buffers of rank 0."""
    first = model[0]
    found: dict[str, Tensor] = {}
    for number, shapes in enumerate(first["param_shapes"]):
        parts = [shard["fp32_flat_groups"][number].detach() for shard in optimizer]
        found.update(join(3, shapes, parts))
    for name, shape in (first["frozen_param_shapes"] or {}).items():
        parts = [shard["frozen_param_fragments"][name].flatten() for shard in model]
        found.update(join(3, {name: shape}, parts))
    for name, other in first["shared_params"].items():
        found[name] = found[other]
    buffers = set(first["buffer_names"])
    return {name: t if name in buffers else found[name] for name, t in first["module"].items()}


# --- files ---------------------------------------------------------------------------------------

_MODEL = "mp_rank_00_model_states.pt"
_OPTIMIZER = "mp_rank_00_optim_states.pt"


def file_names(ranks: int, stage: int | None, folder: Path) -> list[str]:
    """Names of the files that `ranks` ranks write at a ZeRO stage; None: as seen in `folder`."""
    divided = [f"zero_pp_rank_{rank}_{_MODEL}" for rank in range(ranks)]
    optimizer = [f"zero_pp_rank_{rank}_{_OPTIMIZER}" for rank in range(ranks)]
    if stage is None:
        stage = (
            3 if (folder / divided[0]).exists() else 2 if (folder / optimizer[0]).exists() else 0
        )
    model = divided if stage == 3 else [_MODEL]
    return model + (optimizer if stage > 0 else [])


class _Ignored:
    """Takes the place of an object of DeepSpeed's that is not looked at."""

    def __init__(self, *_: object) -> None:
        pass


# What DeepSpeed puts into its files beside tensors and numbers, and what takes its place where
# files are read without DeepSpeed.
OF_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Ignored,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Ignored,
    "deepspeed.utils.tensor_fragment.fragment_address": _Ignored,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
}


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"checkpoint {path.parent}: {path.name} is missing")
    return load_restricted(path, "cpu", [(type_, name) for name, type_ in OF_DEEPSPEED.items()])


def load_restricted(path: Path | str, device: Any, allowed: Sequence[Any]) -> Any:
    """Read a file of torch.save in which nothing is but tensors, plain values and `allowed` types.

    `allowed` is as torch.serialization.safe_globals takes it. UserError: there is something else.
    """
    with torch.serialization.safe_globals(list(allowed)):
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"checkpoint file {path}: holds more than tensors and numbers, which could "
                "run code; do not use it"
            ) from error
