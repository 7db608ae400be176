"""What each layer could become: its options, with their costs and the losses that they cause."""

import dataclasses
from dataclasses import dataclass

from torch import Tensor, nn

from sbf_dist.compress.budget import Option
from sbf_dist.compress.candidates import convolution, filter_macs
from sbf_dist.compress.divergence import Trial
from sbf_dist.compress.fitting import fit_transforms, rank_channels
from sbf_dist.compress.statistics import Moments

PROBES = 128  # images on which the effect of an option is measured
SHARES = (0.25, 0.5, 0.75)  # of a layer's cost, at which options are tried


@dataclass(frozen=True)
class Estimated:
    """Options of a layer whose losses are comparable among themselves only, and trials of some."""

    options: list[Option]
    tried: list[Option]
    trials: list[Trial]

    def scaled(self, divergences: list[float]) -> list[Option]:
        """Return the options with losses scaled to the KL divergences that the trials cause."""
        scales = [
            (option.cost, divergence / max(option.loss, 1e-30))
            for option, divergence in zip(self.tried, divergences, strict=True)
        ]
        return [
            dataclasses.replace(o, loss=o.loss * min(scales, key=lambda s: abs(s[0] - o.cost))[1])
            for o in self.options
        ]


def estimate_options(
    dense: nn.Module,
    name: str,
    moments: Moments,
    layer_macs: int,
    sensitivity: Tensor,
    sources: int,
    floor: float,
) -> Estimated:
    """Estimate the loss of each (kept, sources) of one layer, all others being dense.

    The summed squared errors, weighted by sensitivity, rank the options of one layer well but not
    those of different layers (errors that add up coherently over positions count for more), so
    they are to be scaled to the KL divergence that a few of the options cause.
    """
    conv = convolution(dense, name)
    channels, size = conv.out_channels, moments.size
    ranking = rank_channels(moments, sensitivity)
    per_filter, per_tap = filter_macs(conv, layer_macs)
    estimated: list[Option] = []
    least = max(1, round(floor * channels))
    for kept in range(least, channels, max(1, channels // 16)):
        rebuilt = ranking[kept:]
        fit = fit_transforms(moments.restrict(ranking[:kept]), rebuilt, sources)
        losses = (sensitivity[rebuilt][:, None] * fit.error).sum(0).tolist()
        for used in range(1, len(losses) + 1):
            total = kept * per_filter + len(rebuilt) * used * size**2 * per_tap
            if total < layer_macs:
                estimated.append(Option(kept, used, total, losses[used - 1]))
    if not estimated:
        return Estimated([], [], [])
    tried = [min(estimated, key=lambda o: abs(o.cost - s * layer_macs)) for s in SHARES]
    trials = []
    for option in tried:
        kept_channels = sorted(ranking[: option.kept])
        rebuilt = sorted(ranking[option.kept :])
        fit = fit_transforms(moments.restrict(kept_channels), rebuilt, option.sources)
        trials.append(Trial(kept_channels, fit))
    return Estimated(estimated, tried, trials)
