"""Ghost modules: some filters, and a cheap 3 × 3 transformation for each of the other channels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sbf_dist.compression.calibration import BATCH
from sbf_dist.compression.candidates import convolution, filter_macs, find_candidates
from sbf_dist.compression.cost import count
from sbf_dist.compression.fitting.statistics import measure_batch_norm
from sbf_dist.compression.recognition import make_all_plain
from sbf_dist.errors import UserError
from sbf_dist.layers import SBFConv2d
from sbf_dist.peers.shrinking import in_proportion, longest_within
from sbf_dist.surgery import deep_copy, in_eval_mode

MIN_KEPT_SHARE = 0.0625  # share of a layer's filters that is left
TRANSFORM_SIZE = 3  # of the cheap transformations


def ghost(model: nn.Module, macs_share: float, images: Tensor, *, seed: int = 0) -> nn.Module:
    """Make Ghost modules of the convolutions of `model` to reach `macs_share` of its MACs.

    A layer keeps the C / s filters of the largest L1 norm as its primary convolution and makes each
    other channel by a 3 × 3 depthwise convolution of one primary feature, without a non-linearity
    between (Han et al., CVPR 2020, section 3.1, equations 2 and 3). s is the same in all layers, as
    the budget wants it. The cheap convolutions are random, as a depthwise nn.Conv2d is, and have to
    be trained. The stem and layers that would not get cheaper stay. Batch norm is measured again on
    `images` (N, C, H, W). Returns the network in eval mode. UserError if the budget cannot be met.
    """
    dense = in_eval_mode(deep_copy(model))
    make_all_plain(dense)
    shape = (images.shape[1], images.shape[2], images.shape[3])
    cost = count(dense, shape)
    with torch.no_grad():
        _, candidates = find_candidates(dense, images, TRANSFORM_SIZE)
    names = [name for name in candidates if convolution(dense, name).groups == 1]
    if not names:
        raise UserError("ghost: the network has no convolution that a Ghost module could replace")
    saved = {}
    for name in names:
        per_filter, per_tap = filter_macs(convolution(dense, name), cost.layers[name])
        saved[name] = per_filter - TRANSFORM_SIZE**2 * per_tap

    def macs(steps: Sequence[tuple[str, int]]) -> int:
        return round(cost.macs - sum(saved[name] for name, _ in steps))

    sizes = {name: convolution(dense, name).out_channels for name in names}
    steps = in_proportion(sizes, MIN_KEPT_SHARE)
    limit = macs_share * cost.macs
    taken = longest_within(steps, macs, limit, f"ghost at {macs_share:g} of the MACs")
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        primaries = sizes[name] - sum(step[0] == name for step in taken)
        if primaries < sizes[name]:
            module = ghost_module(convolution(dense, name), primaries, generator)
            dense.set_submodule(name, module, strict=True)
    measure_batch_norm(dense, images, BATCH)
    return dense


@torch.no_grad()
def ghost_module(conv: nn.Conv2d, primaries: int, generator: torch.Generator) -> SBFConv2d:
    """Return the Ghost module that keeps `primaries` filters of `conv`.

    It is an SBF layer with one source per channel and random transformations, so it is built as
    one, and computed by the same fast operator. Primary features serve in turn as sources.
    """
    size = conv.weight.abs().sum((1, 2, 3))
    kept = sorted(size.argsort(descending=True, stable=True)[:primaries].tolist())
    others = conv.out_channels - primaries
    sources = [[kept[index % primaries]] for index in range(others)]
    module = SBFConv2d.from_conv(conv, kept, sources, TRANSFORM_SIZE)
    bound = 1 / TRANSFORM_SIZE  # Kaiming's, with a = √5 and a fan-in of 3 × 3, as nn.Conv2d begins
    drawn = torch.empty(module.transforms.shape).uniform_(-bound, bound, generator=generator)
    module.transforms.copy_(drawn)
    return module
