"""What each layer could become: its options, with their costs and the losses that they cause."""

import copy
import dataclasses
import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.compress.budget import Option, frontier
from sbf_dist.compress.candidates import convolution, filter_macs, size_for
from sbf_dist.compress.criteria import Ranking
from sbf_dist.compress.fitting import fit_transforms, install
from sbf_dist.compress.statistics import Moments

PROBES = 128  # images on which the effect of an option is measured
STEPS = 16  # numbers of kept channels that are tried in a layer


@dataclass(frozen=True)
class Search:
    """What the options of a layer range over.

    sources: the largest S; transform_size: the largest m, beside which 1 is tried; floor: the
    least share of a layer's channels that is kept; round_to: kept channels come in multiples of
    it, so that layers of no more channels than that stay as they are.
    """

    sources: int = 4
    transform_size: int = 3
    floor: float = 0.125
    round_to: int = 1

    def kept(self, channels: int) -> range:
        """Return the numbers of channels, less than all, that a layer may keep."""
        least = max(1, round(self.floor * channels))
        step = max(1, channels // STEPS)
        multiple = self.round_to
        return range(
            multiple * math.ceil(least / multiple), channels, multiple * math.ceil(step / multiple)
        )

    def sizes(self, conv: nn.Conv2d) -> list[int]:
        """Return the m that are tried in a layer, ascending."""
        return sorted({1, size_for(conv, self.transform_size)})


def layer_options(
    dense: nn.Module,
    name: str,
    moments: Moments,
    probe: Tensor,
    layer_macs: int,
    sensitivity: Tensor,
    ranking: Ranking,
    search: Search,
) -> list[Option]:
    """Estimate the loss of each (kept, sources, m) of one layer, all others being dense.

    The first option is the layer as it is; costs are multiply-adds. `moments` are those of the
    dense layer's own outputs at the largest m, `probe` are images (N, C, H, W). The summed squared
    errors, weighted by sensitivity, rank the options of one layer well but not those of different
    layers (errors that add up coherently over positions count for more), so they are scaled to the
    KL divergence measured with a few of the options in place.
    """
    conv = convolution(dense, name)
    dense_option = Option(conv.out_channels, sources=0, size=1, cost=layer_macs, loss=0.0)
    estimated: list[Option] = []
    orders: dict[int, list[int]] = {}
    for size in search.sizes(conv):
        own = moments.centre(size)
        orders[size] = ranking.order(own, sensitivity)
        for kept in search.kept(conv.out_channels):
            rebuilt = orders[size][kept:]
            fit = fit_transforms(own.restrict(orders[size][:kept]), rebuilt, search.sources)
            losses = (sensitivity[rebuilt][:, None] * fit.error).sum(0).tolist()
            for used, loss in enumerate(losses, 1):
                cost = option_macs(conv, layer_macs, kept, used, size)
                if cost < layer_macs:
                    estimated.append(Option(kept, used, size, cost, loss))
    if not estimated:
        return [dense_option]
    expected = dense(probe).log_softmax(1)
    scales = []
    probed = frontier(estimated)  # the others are never chosen
    for share in (0.25, 0.5, 0.75):
        option = min(probed, key=lambda o: abs(o.cost - share * layer_macs))
        trial = copy.deepcopy(dense)
        kept_channels = sorted(orders[option.size][: option.kept])
        install(trial, name, moments.centre(option.size), kept_channels, option.sources)
        divergence = F.kl_div(
            trial(probe).log_softmax(1), expected, reduction="batchmean", log_target=True
        )
        # Rounding may leave a divergence of nothing below zero.
        scales.append((option.cost, max(float(divergence), 0.0) / max(option.loss, 1e-30)))
    scaled = [
        dataclasses.replace(o, loss=o.loss * min(scales, key=lambda s: abs(s[0] - o.cost))[1])
        for o in estimated
    ]
    return [dense_option, *scaled]


def option_macs(conv: nn.Conv2d, layer_macs: int, kept: int, sources: int, size: int) -> float:
    """Count the multiply-adds of an SBF layer in the place of `conv`, which has `layer_macs`."""
    per_filter, per_tap = filter_macs(conv, layer_macs)
    return kept * per_filter + (conv.out_channels - kept) * sources * size**2 * per_tap


def in_parameters(conv: nn.Conv2d, row: list[Option]) -> list[Option]:
    """Give the options of `conv` their parameters as cost, and leave out those not below its own.

    An SBF layer has a bias in any case: the means of what is rebuilt go there.
    """
    own = sum(parameter.numel() for parameter in conv.parameters())
    priced = [dataclasses.replace(row[0], cost=own)]
    for option in row[1:]:
        rebuilt = conv.out_channels - option.kept
        cost = (
            option.kept * conv.weight[0].numel()
            + rebuilt * option.sources * option.size**2
            + conv.out_channels
        )
        if cost < own:
            priced.append(dataclasses.replace(option, cost=cost))
    return priced
