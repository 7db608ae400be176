"""The plain alternative to rebuilding channels: the same budget met by setting channels to zero.

It is the yardstick of the tables. It gets every advantage that it would have as a pruned network:
a channel that is zero is not counted in the layer that computes it, nor in those that read it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sbf_dist.compression.calibration import BATCH
from sbf_dist.compression.fitting.norms import following_norms
from sbf_dist.compression.fitting.statistics import measure_batch_norm
from sbf_dist.hooks import on_output, registered
from sbf_dist.surgery import deep_copy, in_eval_mode


@torch.no_grad()
def zero_channels(
    model: nn.Module, layers: list[str], images: Tensor, macs: float
) -> tuple[nn.Module, int, int]:
    """Zero the output channels with the smallest filters (L1) of `layers` to reach `macs`.

    Every layer keeps the same share of its channels, the largest that meets the budget, a share
    of the dense network's multiply-adds. Batch norm is measured again on `images` (N, C, H, W),
    calibration images. Returns the network in eval mode, its multiply-adds and its parameters,
    both without what is zero.
    """
    dense = in_eval_mode(deep_copy(model))
    norms = following_norms(dense, images[:2])
    most = max(_convolution(dense, name).out_channels for name in layers)
    budget = macs * effective_cost(dense, images[:BATCH]).macs
    low, high = 0, most  # in steps of one channel of the widest layer
    while low < high:
        middle = (low + high + 1) // 2
        trial = _zeroed(dense, layers, norms, middle / most)
        if effective_cost(trial, images[:BATCH]).macs <= budget:
            low = middle
        else:
            high = middle - 1
    network = _zeroed(dense, layers, norms, low / most)
    measure_batch_norm(network, images, BATCH)
    cost = effective_cost(network, images[:BATCH])
    return network, cost.macs, cost.params


@dataclass(frozen=True)
class EffectiveCost:
    """Cost of a network of which what is zero is left out."""

    macs: int
    params: int


@torch.no_grad()
def effective_cost(model: nn.Module, images: Tensor) -> EffectiveCost:
    """Count the multiply-adds per image of convolutions and linear layers, and all parameters.

    A filter of zeros costs nothing, nor do the weights that read an input channel that is zero on
    all of `images` (but in grouped convolutions, which are counted with all that they read).
    """
    macs = 0
    params = sum(int(parameter.count_nonzero()) for parameter in model.parameters())

    def hook(module: nn.Module, features: Tensor, output: Tensor) -> None:
        nonlocal macs, params
        weight: Tensor = module.weight  # type: ignore[assignment]
        axis = 1 if isinstance(module, nn.Conv2d) else features.ndim - 1
        alive = features.abs().amax([d for d in range(features.ndim) if d != axis]) > 0
        read = weight
        if weight.shape[1] == len(alive):
            read = weight[:, alive]
            params -= int(weight[:, ~alive].count_nonzero())
        filters = int(weight.flatten(1).any(1).sum())
        positions = output[0].numel() // len(weight)
        macs += filters * read[0].numel() * positions

    hooks = (
        on_output(module, hook)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    )
    with registered(hooks):
        model(images)
    return EffectiveCost(macs, params)


def _zeroed(dense: nn.Module, layers: list[str], norms: dict[str, str], share: float) -> nn.Module:
    network = deep_copy(dense)
    for name in layers:
        conv = _convolution(network, name)
        size = conv.weight.abs().sum((1, 2, 3))
        removed = size.argsort(descending=True)[max(1, round(share * len(size))) :]
        parts = [conv] if name not in norms else [conv, network.get_submodule(norms[name])]
        for part in parts:
            for parameter in part.parameters():
                parameter[removed] = 0.0
    return network


def _convolution(model: nn.Module, name: str) -> nn.Conv2d:
    conv = model.get_submodule(name)
    assert isinstance(conv, nn.Conv2d), f"{name} is a {type(conv).__name__}"
    return conv
