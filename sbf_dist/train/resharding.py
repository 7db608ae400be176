"""Between a running engine, whose numbers are divided over the ranks, and whole tensors by name."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sbf_dist.train.shards import EMA, Shapes, Whole, cut, join


def optimized(engine: Any) -> list[Tensor]:
    """What the optimizer steps on this rank: parameters at ZeRO stage 0, else a part per group."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in engine.optimizer.param_groups for p in group["params"]]


def named_parts(engine: Any) -> list[tuple[str, Tensor]]:
    """`optimized` with names: of the parameter, or of the group that it is a part of."""
    names = names_of_groups(engine)
    if engine.zero_optimization_stage() == 0:
        flat = [name for group in names for name in group]
    else:
        flat = [f"{group[0]} … {group[-1]}" for group in names]
    return list(zip(flat, optimized(engine), strict=True))


def state_of(engine: Any, tensor: Tensor) -> dict[str, Any]:
    """The optimizer's state of one of `optimized`."""
    return base_optimizer(engine).state[tensor]


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """PyTorch's optimizer, which ZeRO wraps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def gather(engine: Any, key: str | None = None) -> dict[str, Tensor]:
    """The trained parameters, or with `key` that state of the optimizer, whole and by name.

    Every rank calls it, and gets all of it on the engine's device.
    """
    stage = engine.zero_optimization_stage()
    mine = [t.detach() if key is None else state_of(engine, t)[key] for t in optimized(engine)]
    if stage == 0:
        names = [name for group in names_of_groups(engine) for name in group]
        return dict(zip(names, mine, strict=True))
    found = {}
    for (shapes, _), part in zip(_groups(engine), mine, strict=True):
        found.update(join(stage, shapes, _gathered(part)))
    return found


def whole_state(engine: Any, *, averaged: bool = False) -> dict[str, Any]:
    """The state dict of engine.module as if nothing were divided, or of the average of its weights.

    Every rank calls it. Buffers are those of this rank.
    """
    state = dict(engine.module.state_dict())
    found = gather(engine, EMA) if averaged else {}
    if engine.zero_optimization_stage() == 3:
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                own = _gathered(parameter.ds_tensor.flatten())
                found |= join(3, {name: parameter.ds_shape}, own)
        found = (gather(engine) if not averaged else {}) | found
    for name, other in shared_names(engine).items():
        found |= {name: found[other]} if other in found else {}
    return state | found | (engine.average.buffers if averaged else {})


def shared_names(engine: Any) -> dict[str, str]:
    """Further names of parameters that have several, and the first of each."""
    first = {parameter: name for name, parameter in engine.module.named_parameters()}
    every = engine.module.named_parameters(remove_duplicate=False)
    return {name: first[p] for name, p in every if first[p] != name}


def _gathered(part: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return parts


def names_of_groups(engine: Any) -> list[list[str]]:
    """Names of the trained parameters of each group of the optimizer."""
    if engine.zero_optimization_stage() > 0:
        return [list(shapes) for shapes, _ in _groups(engine)]
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return [[names[p] for p in group["params"]] for group in engine.optimizer.param_groups]


def put(engine: Any, whole: Whole) -> None:
    """Give the engine, at ZeRO stage 1, 2 or 3, its part of what another number of ranks saved."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        zero.checkpoint_event_prologue()  # small parameters, which are kept whole, are divided
        _put_undivided_of_stage_3(engine, whole)
    else:
        engine.module.load_state_dict(whole.weights)
        zero.refresh_fp32_params()
    for number, (shapes, part) in enumerate(_groups(engine)):
        if stage == 3:
            part.data.copy_(_part(stage, [whole.weights[name] for name in shapes], part))
            zero._reassign_or_swap_out_partitioned_parameters(number)
        states = [whole.optimizer[name] for name in shapes]
        for key, value in states[0].items():
            mine: Any = value  # a count of steps, the same for all
            if torch.is_tensor(value) and value.ndim > 0:
                mine = _part(stage, [state[key] for state in states], part).to(part.device)
            state_of(engine, part)[key] = mine
    if stage == 3:
        zero.checkpoint_event_epilogue()
    for name, count in whole.counters.items():
        setattr(engine, name, count)


def _put_undivided_of_stage_3(engine: Any, whole: Whole) -> None:
    for name, buffer in engine.module.named_buffers():
        if name in whole.weights:
            buffer.copy_(whole.weights[name])
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            own = parameter.ds_tensor
            own.data.copy_(_part(3, [whole.weights[name]], own.flatten()).reshape(own.shape))


def _groups(engine: Any) -> Iterator[tuple[Shapes, Tensor]]:
    """At ZeRO stage 1, 2 or 3: names and shapes of a group's parameters, and this rank's part."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    groups = zero.fp16_groups if stage == 3 else zero.round_robin_bit16_groups
    for group, part in zip(groups, optimized(engine), strict=True):
        yield {names[p]: p.ds_shape if stage == 3 else p.shape for p in group}, part


def _part(stage: int, tensors: list[Any], own: Tensor) -> Tensor:
    return cut(stage, tensors, rank=dist.get_rank(), ranks=dist.get_world_size(), size=own.numel())
