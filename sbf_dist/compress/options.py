"""What each layer could become: its options, with their costs and the losses that they cause."""

import copy
import dataclasses
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.compress.budget import Option
from sbf_dist.compress.calibration import Calibration
from sbf_dist.compress.candidates import convolution, filter_macs, size_for
from sbf_dist.compress.cost import Cost
from sbf_dist.compress.fitting import fit_transforms, install, rank_channels
from sbf_dist.compress.statistics import gather_moments, run_until

PROBES = 128  # images on which the effect of an option is measured


def layer_options(
    dense: nn.Module,
    name: str,
    images: Calibration,
    cost: Cost,
    sensitivity: Tensor,
    sources: int,
    transform_size: int,
    floor: float,
) -> list[Option]:
    """Estimate the loss of each (kept, sources) of one layer, all others being dense.

    The summed squared errors, weighted by sensitivity, rank the options of one layer well but not
    those of different layers (errors that add up coherently over positions count for more), so
    they are scaled to the KL divergence measured with a few of the options in place.
    """
    conv = convolution(dense, name)
    channels = conv.out_channels

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        bias = 0.0 if conv.bias is None else conv.bias[:, None, None]
        for batch in images.parts(images.part):
            outputs = run_until(dense, name, batch, output=True)
            yield outputs - bias, outputs

    size = size_for(conv, transform_size)
    moments = gather_moments(pairs(), size)
    ranking = rank_channels(moments, sensitivity)
    per_filter, per_tap = filter_macs(conv, cost.layers[name])
    estimated: list[Option] = []
    least = max(1, round(floor * channels))
    for kept in range(least, channels, max(1, channels // 16)):
        rebuilt = ranking[kept:]
        fit = fit_transforms(moments.restrict(ranking[:kept]), rebuilt, sources)
        losses = (sensitivity[rebuilt][:, None] * fit.error).sum(0).tolist()
        for used in range(1, len(losses) + 1):
            total = kept * per_filter + len(rebuilt) * used * size**2 * per_tap
            if total < cost.layers[name]:
                estimated.append(Option(kept, used, total, losses[used - 1]))
    dense_option = Option(kept=channels, sources=0, cost=cost.layers[name], loss=0.0)
    if not estimated:
        return [dense_option]
    probe = images.first(PROBES)
    expected = dense(probe).log_softmax(1)
    scales = []
    for share in (0.25, 0.5, 0.75):
        wanted = share * cost.layers[name]
        option = min(estimated, key=lambda o: abs(o.cost - wanted))
        trial = copy.deepcopy(dense)
        install(trial, name, moments, sorted(ranking[: option.kept]), option.sources)
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
