"""Applying a plan to a network."""

import torch
from torch import Tensor, nn

from sbf_dist.compression.inputs import Packing
from sbf_dist.compression.narrow import check_fits, narrow
from sbf_dist.compression.plan import Plan, SBFLayer
from sbf_dist.compression.recognition import make_plain
from sbf_dist.compression.remembered import remember
from sbf_dist.errors import UserError
from sbf_dist.layers import SBFConv2d
from sbf_dist.surgery import become, deep_copy, unwrapped


def convert(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of `model` without removed channels, planned convolutions as SBF layers.

    Kept filters and biases are copied; transformations have their initial values until they are
    fitted (`reconstruct`) or loaded. `model` itself is not changed. Raises UserError,
    naming the first layer that differs, if the plan belongs to another network.
    """
    student = deep_copy(unwrapped(model))
    convolutions = [n for n, module in student.named_modules() if isinstance(module, nn.Conv2d)]
    for name in convolutions:
        if name not in plan.layers:
            raise UserError(f"plan has no layer {name}: it belongs to {plan.model!r}")
    if plan.removed:
        narrow(student, plan.removed)
        check_fits(student, plan.input_shape, Packing.planned(plan))
    for name, layer in plan.layers.items():
        if name not in convolutions:
            raise UserError(
                f"plan names layer {name}, which this network does not have: "
                f"it belongs to {plan.model!r}"
            )
        if isinstance(layer, SBFLayer):
            replace(student, name, layer)
    return remember(student, plan)


def replace(model: nn.Module, name: str, layer: SBFLayer) -> SBFConv2d:
    """Replace the convolution `name` of `model` in place, and return its SBF layer.

    The SBF layer always has a bias: the means of what is rebuilt go there. It pads as the
    convolution does; filters that this computes from others are constants of the SBF layer. A
    convolution that has several names is replaced under all of them.
    """
    conv = model.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    conv = make_plain(conv, name)
    if conv.out_channels != layer.channels:
        raise UserError(
            f"plan gives layer {name} {layer.channels} channels, this network "
            f"{conv.out_channels}: the plan belongs to another network"
        )
    try:
        between = make_between(layer.between, len(layer.kept), conv.weight)
        sbf = SBFConv2d.from_conv(conv, layer.kept, layer.sources, layer.transform_size, between)
    except ValueError as error:  # a plan that was edited: what its own checks cannot know
        raise UserError(f"plan, layer {name}: {error}") from None
    if sbf.bias is None:
        sbf.bias = nn.Parameter(torch.zeros(conv.out_channels).to(conv.weight))
    become(conv, sbf)
    assert isinstance(conv, SBFConv2d)
    return conv


def make_between(kind: str | None, channels: int, like: Tensor) -> nn.Module | None:
    """Build what stands between basis and transformations of a layer, as a plan names it.

    `channels` is the number of basis features. Device and dtype are those of `like`.
    """
    if kind is None:
        return None
    assert kind == "bn_relu", kind
    norm = nn.BatchNorm2d(channels, device=like.device, dtype=like.dtype)
    return nn.Sequential(norm, nn.ReLU())
