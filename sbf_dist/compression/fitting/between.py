"""Batch norm and ReLU between basis and transformations (Miles and Mikolajczyk, ICCVW 2023)."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sbf_dist.compression.convert import make_between
from sbf_dist.compression.plan import SBFLayer
from sbf_dist.hooks import registered
from sbf_dist.layers import SBFConv2d

REACH = 3.0  # standard deviations below the mean at which the ReLU begins to cut


@torch.no_grad()
def insert_between(
    student: nn.Module, layers: dict[str, SBFLayer], batches: Iterable[Tensor], kind: str
) -> dict[str, SBFLayer]:
    """Give fitted SBF layers, in place, something between, and return their plans.

    The batch norm starts such that the ReLU cuts what is more than REACH standard deviations
    below a feature's mean, and biases make up for the shift: but for that tail, and for the
    borders, where padding adds zeros to shifted features, a layer gives what it gave. Training has
    to make use of it.
    """
    moments = _moments(student, list(layers), batches)
    planned = {}
    for name, layer in layers.items():
        sbf = student.get_submodule(name)
        assert isinstance(sbf, SBFConv2d)
        assert sbf.bias is not None
        mean, variance = moments[name]
        between = make_between(kind, len(sbf.kept), sbf.transforms)
        assert isinstance(between, nn.Sequential)
        norm = between[0]
        assert isinstance(norm, nn.BatchNorm2d)
        scale = (variance + norm.eps).sqrt()
        norm.weight.copy_(scale)
        norm.bias.copy_(REACH * scale)
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        shift = (REACH * scale - mean)[sbf.sources]  # of each source, (P, S)
        rebuilt = sorted(set(range(sbf.out_channels)) - set(sbf.kept))
        taken = (sbf.transforms.double().sum((2, 3)) * shift).sum(1)
        sbf.bias[rebuilt] -= taken.to(sbf.bias)
        sbf.between = between.train(sbf.training)
        planned[name] = layer.model_copy(update={"between": kind})
    return planned


def _moments(
    student: nn.Module, names: list[str], batches: Iterable[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of each layer's basis features, both (B,), double."""
    sums: dict[str, list[Tensor]] = {}
    counts = dict.fromkeys(names, 0)

    def hook_of(name: str):
        def hook(layer: SBFConv2d, _: tuple[Tensor, ...], output: Tensor) -> None:
            assert layer.bias is not None
            kept = list(layer.kept)
            z = (output[:, kept] - layer.bias[kept, None, None]).double()
            found = [z.sum((0, 2, 3)), z.square().sum((0, 2, 3))]
            old = sums.get(name)
            sums[name] = found if old is None else [a + b for a, b in zip(old, found, strict=True)]
            counts[name] += math.prod(z.shape) // z.shape[1]

        return hook

    with registered(student.get_submodule(n).register_forward_hook(hook_of(n)) for n in names):
        for images in batches:
            student(images)
    moments = {}
    for name, (first, second) in sums.items():
        mean = first / counts[name]
        moments[name] = mean, (second / counts[name] - mean.square()).clamp(min=0)
    return moments
