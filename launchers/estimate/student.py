"""A student of a given cost before there is a plan: every layer shrunk by the same share."""

import torch
from torch import nn

from sbf_dist.compression.candidates import convolution, find_candidates, size_for
from sbf_dist.compression.cost import count
from sbf_dist.compression.planning.options import Shape
from sbf_dist.layers import SBFConv2d
from sbf_dist.recipe import Compress
from sbf_dist.surgery import become, deep_copy, in_eval_mode

_HALVINGS = 30


def even_student(
    dense: nn.Module, settings: Compress, input_shape: tuple[int, int, int]
) -> nn.Module:
    """Return a student of the budget's multiply-adds or parameters, with arbitrary filters kept.

    A budget of time is taken for one of multiply-adds: a share as it is, milliseconds as a half.
    The plan that images lead to has another share for each layer, at the same cost.
    """
    student = in_eval_mode(deep_copy(dense))
    cost = count(dense, input_shape)
    _, names = find_candidates(
        student, torch.zeros(1, *input_shape), settings.transform_size, settings.keep
    )
    shapes = {name: Shape.of(convolution(student, name), cost.layers[name]) for name in names}
    budget = settings.budget
    in_params = budget.kind == "params"
    whole = cost.params if in_params else cost.macs
    limit = whole / 2 if budget.kind == "latency_ms" else budget.limit(whole)

    def kept(name: str, share: float) -> int:
        channels = shapes[name].channels
        unit = settings.round_to * shapes[name].groups
        return min(channels, max(unit, round(share * channels / unit) * unit))

    def saved(share: float) -> float:
        total = 0.0
        for name, shape in shapes.items():
            size = size_for(convolution(student, name), settings.transform_size)
            number = kept(name, share)
            if number < shape.channels:
                macs = shape.option_macs(number, settings.sources, size)
                params = shape.option_params(number, settings.sources, size)
                total += shape.params - params if in_params else shape.macs - macs
        return total

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if whole - saved(middle) <= limit else (low, middle)
    for name in names:
        conv = convolution(student, name)
        number = kept(name, low)
        if number < conv.out_channels:
            become(conv, _shrunk(conv, number, settings))
    return student


def _shrunk(conv: nn.Conv2d, number: int, settings: Compress) -> SBFConv2d:
    """Keep as many filters of each group, the first of it."""
    per_group = conv.out_channels // conv.groups
    own = number // conv.groups
    basis = [g * per_group + i for g in range(conv.groups) for i in range(own)]
    wanted = min(settings.sources, own)
    rows = [
        [channel // per_group * per_group + i for i in range(wanted)]
        for channel in range(conv.out_channels)
        if channel not in set(basis)
    ]
    size = size_for(conv, settings.transform_size)
    return SBFConv2d.from_conv(conv, basis, rows, size)
