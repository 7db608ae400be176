"""What each layer could become: its options, with their costs and the losses that they cause."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from sbf_dist.compression.candidates import size_for
from sbf_dist.compression.fitting.mixture import MixtureSpace
from sbf_dist.compression.fitting.statistics import Moments
from sbf_dist.compression.fitting.transforms import fit_transforms
from sbf_dist.compression.outputs import LOGITS, Yardstick
from sbf_dist.compression.planning.criteria import Ranking
from sbf_dist.compression.planning.divergence import MixtureTrial, Trial
from sbf_dist.compression.planning.knapsack import Option, frontier
from sbf_dist.layers import SBFConv2d
from sbf_dist.settings import Compression

PROBES = 128  # images on which the effect of an option is measured
SHARES = (0.25, 0.5, 0.75)  # of a layer's cost, at which options are tried
STEPS = 16  # numbers of kept channels that are tried in a layer
TINY = 1e-30
EVENNESS = 0.3  # nats; what keeps layers trainable, against what is least lost before training
# Weights of a filter, of those of a channel that is rebuilt from the whole basis: from here on the
# latter cost little beside the filters.
LARGE_FILTER = 4
MIXTURE_STEPS = 64  # the same of mixtures, which take one decomposition in all
# Channels of a layer beyond which a mixture has been better than transformations of more than one
# tap in all networks that were tried. Their Gram matrices would be most of a plan's time.
NARROW = 128


@dataclass(frozen=True)
class Search:
    """What the options of a layer range over, by the settings of a compression.

    `yardstick` measures what they lose. Beside the largest m, 1 is tried. Kept channels come in
    multiples of round_to, so that layers of no more channels than that stay as they are.
    """

    settings: Compression
    yardstick: Yardstick = LOGITS

    @property
    def has_between(self) -> bool:
        """Whether layers get a batch norm before the transformations, which has parameters."""
        return self.settings.between is not None

    @property
    def uses_whole_basis(self) -> bool:
        """Whether channels may be rebuilt from the whole basis (`mixture`), beyond `sources`."""
        return self.settings.mixtures and self.settings.refit

    @property
    def is_timed(self) -> bool:
        """Whether costs are measured times, which a small number of sources may keep low."""
        return self.settings.budget.unit == "ms"

    def kept(self, channels: int, steps: int = STEPS, groups: int = 1) -> range:
        """Return the numbers of channels, less than all, that a layer may keep.

        Of a grouped convolution they are multiples of its groups.
        """
        least = max(1, round(self.settings.floor * channels))
        step = max(1, channels // steps)
        multiple = math.lcm(self.settings.round_to, groups)
        return range(
            multiple * math.ceil(least / multiple), channels, multiple * math.ceil(step / multiple)
        )

    def size(self, layer: nn.Conv2d | SBFConv2d) -> int:
        """Return the largest m that is tried in a layer."""
        return 1 if self._only_mixes(layer) else size_for(layer, self.settings.transform_size)

    def _only_mixes(self, layer: nn.Conv2d | SBFConv2d) -> bool:
        can_mix = isinstance(layer, nn.Conv2d) and layer.groups == 1 and self.uses_whole_basis
        by_error = self.settings.criterion == "reconstruction" and not self.is_timed
        return can_mix and by_error and layer.out_channels > NARROW


@dataclass(frozen=True)
class Shape:
    """What the cost of a layer follows from.

    channels: output channels; weights: of one filter; macs, params: of the dense convolution;
    groups: of its channels.
    """

    channels: int
    weights: int
    macs: int
    params: int
    groups: int = 1

    @classmethod
    def of(cls, conv: nn.Conv2d, macs: int) -> Self:
        """Describe `conv`, which has `macs` multiply-adds."""
        params = sum(parameter.numel() for parameter in conv.parameters())
        return cls(conv.out_channels, conv.weight[0].numel(), macs, params, conv.groups)

    def as_it_is(self) -> Option:
        """Return the option of the dense convolution."""
        return Option(self.channels, sources=0, size=1, cost=self.macs, loss=0.0)

    def option_macs(self, kept: int, sources: int, size: int) -> float:
        """Count the multiply-adds of the convolution as an SBF layer."""
        taps = (self.channels - kept) * sources * size**2
        return self.macs * (kept + taps / self.weights) / self.channels

    def option_params(self, kept: int, sources: int, size: int, *, between: bool = False) -> int:
        """Count the parameters as an SBF layer: it always has a bias, for the means."""
        taps = (self.channels - kept) * sources * size**2
        return kept * (self.weights + 2 * between) + taps + self.channels

    def in_parameters(self, row: list[Option], *, between: bool = False) -> list[Option]:
        """Give options their parameters as cost, and leave out those not below the first's."""
        priced = [
            dataclasses.replace(
                o, cost=self.option_params(o.kept, o.sources, o.size, between=between)
            )
            if o.sources
            else dataclasses.replace(o, cost=self.params)
            for o in row
        ]
        return [priced[0], *(option for option in priced[1:] if option.cost < priced[0].cost)]


@dataclass(frozen=True)
class Estimated:
    """Options of a layer whose losses are comparable among themselves only, and trials of some.

    explained: the share of the outputs' variance that each option explains.
    """

    options: list[Option]
    explained: list[float]
    tried: list[Option]
    trials: list[Trial | MixtureTrial]

    def scaled(self, divergences: list[float]) -> list[Option]:
        """Return the options with losses scaled to the divergences that the trials cause.

        To these, EVENNESS x −log of the explained share is added (the logarithm: Zhang et al. 2015,
        arXiv 1505.06798, section 3.2): a layer of a small number of
        dimensions is hard to train, even where they hardly matter now.
        Errors of different m add up differently over positions, so that each family has scales of
        its own. They are interpolated between the costs of the trials: where a scale jumped, the
        allocation would choose the options on the lower side of the jump.
        """
        scales: dict[tuple[int, bool], list[tuple[float, float]]] = {}
        for option, divergence in zip(self.tried, divergences, strict=True):
            scale = math.log(max(divergence, TINY) / max(option.loss, TINY))
            scales.setdefault(family_of(option), []).append((option.cost, scale))

        def loss(option: Option, explained: float) -> float:
            costs, logs = np.array(sorted(scales[family_of(option)])).T
            scaled = option.loss * math.exp(np.interp(option.cost, costs, logs))
            return scaled - EVENNESS * math.log(max(explained, TINY))

        return [
            dataclasses.replace(option, loss=loss(option, share))
            for option, share in zip(self.options, self.explained, strict=True)
        ]


def estimate_options(
    shape: Shape,
    now: Option,
    moments: Moments,
    sensitivity: Tensor,
    ranking: Ranking,
    search: Search,
) -> Estimated:
    """Estimate the loss of each (kept, sources, m) of a layer below `now`, what it is.

    Costs are multiply-adds; `moments` are those of the layer's own outputs at the largest m. The
    summed squared errors, weighted by sensitivity, rank the options of one layer well but not
    those of different layers (errors that add up coherently over positions count for more), so
    they are to be scaled to the divergence that some of the options cause.
    """
    estimated: list[tuple[Option, float]] = []
    variance = max(float(moments.yy.sum()), TINY)
    orders: dict[int, list[int]] = {}
    # A mixture's filters are mixtures of all, but groups read different channels.
    space = None if shape.groups > 1 else _space(search, ranking, now, moments, sensitivity)
    numbers = _kept(search, shape, now)
    sizes = {1, moments.size}
    if space is not None and not search.is_timed and shape.weights >= LARGE_FILTER * shape.channels:
        sizes -= {1}  # a mixture is better, and its taps cost little beside the filters
    for size in sorted(sizes):
        own = moments.centre(size)
        order = orders[size] = ranking.order(own, sensitivity)
        ordered = own.restrict(order)
        for kept in numbers:
            rebuilt = sorted(set(range(shape.channels)) - set(order[:kept]))
            fit = fit_transforms(ordered.leading(kept), rebuilt, search.settings.sources)
            losses = (sensitivity[rebuilt][:, None] * fit.error).sum(0).tolist()
            shares = (1 - fit.error.sum(0) / variance).tolist()
            for used, (loss, share) in enumerate(zip(losses, shares, strict=True), 1):
                cost = shape.option_macs(kept, used, size)
                estimated.append((Option(kept, used, size, cost, loss), share))
    if space is not None:
        losses = space.losses().tolist()
        # Of the best space of that many dimensions, which is as good as this one but for weights.
        even = MixtureSpace(moments.centre(1), torch.ones_like(sensitivity))
        shares = (1 - even.losses() / variance).tolist()
        for kept in _kept(search, shape, now, MIXTURE_STEPS):
            cost = shape.option_macs(kept, kept, 1)
            option = Option(kept, kept, 1, cost, losses[kept], whole_basis=True)
            estimated.append((option, shares[kept]))
    estimated = [(option, share) for option, share in estimated if option.cost < now.cost]
    options = [option for option, _ in estimated]
    tried = []
    for family in dict.fromkeys(map(family_of, options)):
        probed = frontier([o for o in options if family_of(o) == family])  # others are not chosen
        wanted = [share * now.cost for share in SHARES]
        tried += [min(probed, key=lambda o: abs(o.cost - cost)) for cost in wanted]
    trials: list[Trial | MixtureTrial] = []
    for option in tried:
        if option.whole_basis:
            assert space is not None
            trials.append(MixtureTrial.of(space.fit(option.kept, ranking.among)))
            continue
        kept_channels = sorted(orders[option.size][: option.kept])
        rebuilt = sorted(set(range(shape.channels)) - set(kept_channels))
        own = moments.centre(option.size).restrict(kept_channels)
        trials.append(Trial(kept_channels, fit_transforms(own, rebuilt, option.sources)))
    return Estimated(options, [share for _, share in estimated], tried, trials)


def family_of(option: Option) -> tuple[int, bool]:
    """Return what options have in common whose errors add up alike over positions."""
    return option.size, option.whole_basis


def _space(
    search: Search, ranking: Ranking, now: Option, moments: Moments, sensitivity: Tensor
) -> MixtureSpace | None:
    """The space of a layer's outputs, if mixtures are to be tried and can be.

    An SBF layer of another form has no filters for what it rebuilds, and scores would have no say.
    """
    if search.uses_whole_basis and ranking.scores is None and (not now.sources or now.whole_basis):
        return MixtureSpace(moments.centre(1), sensitivity)
    return None


def _kept(search: Search, shape: Shape, now: Option, steps: int = STEPS) -> Iterable[int]:
    """Numbers of channels to try: of an SBF layer also its own, with fewer sources."""
    numbers = search.kept(shape.channels, steps, shape.groups)
    fewer = [kept for kept in numbers if kept <= now.kept]
    if now.sources and now.kept not in fewer:
        fewer.append(now.kept)
    return fewer
