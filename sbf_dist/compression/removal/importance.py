"""How much the channels of each coupled group matter."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.finite import check_gradients
from sbf_dist.compression.outputs import LOGITS, Yardstick, run_backward
from sbf_dist.compression.recognition import weight_of
from sbf_dist.compression.removal.coupled import Coupled
from sbf_dist.hooks import on_input

Importance = Literal["fisher", "taylor", "l1", "l2", "bn_scale"]
SAMPLES = 512  # images on which the criteria fisher and taylor are measured


def measure_importance(
    dense: nn.Module,
    groups: Sequence[Coupled],
    images: Calibration,
    criterion: Importance = "fisher",
    seed: int = 0,
    yardstick: Yardstick = LOGITS,
) -> list[Tensor]:
    """Return for each group how much each of its channels matters, (channels,).

    fisher: the root of the divergence that removing it causes, to second order. With g the
    gradient of the loss that `yardstick` draws (of logits, the log-probability of a label drawn
    from the network's own predictions, at a temperature) and x the channel where it is read, less
    its mean (which the next layer's bias or batch norm makes up for), that is E⟨g, x⟩² up to a
    factor; products are summed over positions and over all layers that read the channel before
    they are squared (Liu et al. 2021, Group Fisher Pruning, section 3.2). Roots, unlike squares,
    bound the effect of several channels by their sum (Minkowski).
    taylor: E|⟨g, x⟩| (Molchanov et al. 2017, section 2.2). l1, l2: norm of all weights that make
    or read it; bn_scale: sum of its batch norms' |weight|; both as a share of the group's mean
    (Fang et al. 2023, DepGraph, section 3.3).
    """
    if criterion in ("fisher", "taylor"):
        products = _products(dense, groups, images, seed, yardstick)
        if criterion == "taylor":
            return [product.abs().mean(0) for product in products]
        return [product.square().mean(0).sqrt() for product in products]
    scores = [_weight_score(dense, group, criterion) for group in groups]
    return [score / score.mean().clamp(min=1e-30) for score in scores]


def _products(
    dense: nn.Module,
    groups: Sequence[Coupled],
    images: Calibration,
    seed: int,
    yardstick: Yardstick,
) -> list[Tensor]:
    """⟨gradient, centred feature⟩ of each group's channels on each image, (images, channels)."""
    readers = {part.name for group in groups for part in group.parts if part.side == "inp"}
    sums: dict[str, Tensor] = {}

    def read(name: str) -> Callable[[nn.Module], RemovableHandle]:
        linear = isinstance(dense.get_submodule(name), nn.Linear)

        def hook(_: nn.Module, given: Tensor) -> Tensor:
            features = given.clone()  # so that the gradient is that of this reader alone
            seen = features.detach()  # the features would keep the graph that keeps the hook

            def backward(gradient: Tensor) -> None:
                with torch.no_grad():
                    x, g = seen, gradient
                    if linear:
                        x, g = x.movedim(-1, 1), g.movedim(-1, 1)
                    x, g = (t.reshape(*t.shape[:2], -1) for t in (x, g))
                    mean = x.mean((0, 2), keepdim=True)
                    product = ((x - mean) * g).sum(2).double().cpu()
                    sums[name] = sums[name] + product if name in sums else product

            features.register_hook(backward)
            return features

        return lambda layer: on_input(layer, hook)

    rows: list[list[Tensor]] = [[] for _ in groups]
    hooks = {name: read(name) for name in readers}
    batches = images.parts(images.part // 2, SAMPLES)
    for passed in run_backward(dense, hooks, batches, yardstick, seed=seed):
        check_gradients(sums)
        for group, row in zip(groups, rows, strict=True):
            parts = [p for p in group.parts if p.side == "inp" and p.name in sums]
            total = torch.zeros(passed, group.size, dtype=torch.double)
            for part in parts:
                total += _gather(sums[part.name], part.channels, dim=1)
            row.append(total)
        sums.clear()
    return [torch.cat(row) for row in rows]


def _gather(values: Tensor, channels: list[list[int]], dim: int) -> Tensor:
    """Sum `values` over the numbers of each channel along `dim`."""
    flat = torch.tensor([number for row in channels for number in row], device=values.device)
    owner = torch.tensor([i for i, row in enumerate(channels) for _ in row], device=values.device)
    shape = list(values.shape)
    shape[dim] = len(channels)
    return values.new_zeros(shape).index_add_(dim, owner, values.index_select(dim, flat))


def _weight_score(dense: nn.Module, group: Coupled, criterion: Importance) -> Tensor:
    total = torch.zeros(group.size, dtype=torch.double)
    for part in group.parts:
        module = dense.get_submodule(part.name)
        if criterion == "bn_scale":
            if isinstance(module, _BatchNorm) and module.affine:
                total += _gather(module.weight.abs().double().cpu(), part.channels, 0)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            weight = weight_of(module)
            weight = weight if part.side == "out" else weight.transpose(0, 1)
            power = weight.double().cpu().abs() ** (1 if criterion == "l1" else 2)
            total += _gather(power.flatten(1).sum(1), part.channels, 0)
    return total.sqrt() if criterion == "l2" else total


def has_scales(dense: nn.Module, group: Coupled) -> bool:
    """Whether a batch norm scales the channels of `group`."""
    modules = [dense.get_submodule(part.name) for part in group.parts]
    return any(isinstance(module, _BatchNorm) and module.affine for module in modules)
