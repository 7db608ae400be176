"""The options of all layers of a network, measured on calibration images."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.layerwise import gather_layers, layer_of
from sbf_dist.compression.fitting.prior import prior_variances, with_prior
from sbf_dist.compression.fitting.refit import linear_heads
from sbf_dist.compression.fitting.resuming import Passes
from sbf_dist.compression.fitting.statistics import Moments, output_sensitivity
from sbf_dist.compression.planning.criteria import Ranking, rankings
from sbf_dist.compression.planning.divergence import divergences
from sbf_dist.compression.planning.knapsack import Option
from sbf_dist.compression.planning.options import PROBES, Estimated, Search, Shape, estimate_options
from sbf_dist.compression.progress import Progress, report, reported
from sbf_dist.compression.recognition import weight_of

FISHER = 128  # images on which sensitivities are measured
LEAST_DRAWN = 256  # labels by which the effect of an option is measured, or as many as images


@dataclass(frozen=True)
class OptionTable:
    """What each layer could become, and what decides which channels it then keeps.

    shapes: what the layers' costs follow from; rows: the options, the layer as it is first, with
    multiply-adds as costs; rankings: the orders of channels; sensitivity: (C,) of each layer;
    priors: (C_in,), the variances of its inputs (`prior_variances`), and of those of linear layers
    that can be solved anew.
    """

    shapes: Mapping[str, Shape]
    rows: dict[str, list[Option]]
    rankings: dict[str, Ranking]
    sensitivity: dict[str, Tensor]
    priors: dict[str, Tensor]

    def order(self, name: str, moments: Moments) -> list[int]:
        """Order the channels of a layer so that each prefix is the basis of its size."""
        return self.rankings[name].order(moments, self.sensitivity[name])


def measure_options(
    passes: Passes,
    shapes: Mapping[str, Shape],
    now: Mapping[str, Option],
    held: Calibration | None,
    search: Search,
    *,
    seed: int,
    among: Mapping[str, Collection[int]] | None = None,
    progress: Progress | None = None,
) -> OptionTable:
    """Measure the options of the layers of a network (in eval mode) that `shapes` names.

    `passes` are over that network and the images to fit to, from the start; `now` is what each of
    the layers is, convolution or SBF layer; `among` names the channels of a layer that may be kept,
    where these are not all. What trials bring about is measured on the images that are `held` out,
    if there are any: on those that they are fitted to, it would be up to a hundred times less.
    """
    names, model, images = list(shapes), passes.model, passes.images
    yardstick = search.yardstick

    def batches() -> Iterator[Tensor]:
        return reported(progress, "measure sensitivities", images, FISHER)

    ranked = rankings(model, names, batches, search.settings.criterion, seed, yardstick)
    for name, channels in (among or {}).items():
        ranked[name] = ranked[name].restrict(channels)
    sensitivity = output_sensitivity(model, names, batches, seed, yardstick)
    sizes = {name: search.size(layer_of(model, name)) for name in names}
    estimated: dict[str, Estimated] = {}
    # Those of linear layers are wanted last, but cost nothing here.
    priors = prior_variances(model, names + linear_heads(model, images.first(2)), images)
    for index, (name, gathered) in enumerate(gather_layers(model, sizes, images, passes), 1):
        report(progress, "measure layers", index, len(sizes))
        layer, moments = layer_of(model, name), gathered
        if isinstance(layer, nn.Conv2d):
            moments = with_prior(gathered, weight_of(layer), priors.get(name))
        estimated[name] = estimate_options(
            shapes[name], now[name], moments, sensitivity[name], ranked[name], search
        )
    trials = {name: row.trials for name, row in estimated.items() if row.trials}
    judges = held or images
    probes = reported(progress, "measure divergences", judges, PROBES)
    draws = max(1, round(LEAST_DRAWN / judges.count))
    measured = divergences(model, trials, probes, seed=seed, draws=draws, yardstick=yardstick)
    rows = {
        name: [now[name], *row.scaled(measured.get(name, []))] for name, row in estimated.items()
    }
    return OptionTable(shapes, rows, ranked, sensitivity, priors)
