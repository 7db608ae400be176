"""Choosing basis and sources of one layer, and fitting its transformations by least squares."""

import heapq
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.compression.candidates import convolution, filter_macs
from sbf_dist.compression.convert import replace
from sbf_dist.compression.fitting.statistics import Moments
from sbf_dist.compression.plan import SBFLayer

RIDGE = 1e-4  # relative to the mean variance of the features that a system contains
# Relative to the largest variance of all: what is below is rounding, not a feature.
FLOOR = 1e-12


def rank_channels(
    moments: Moments, weights: Tensor, among: Collection[int] | None = None
) -> list[int]:
    """Order all channels, or those in `among`, so that each prefix is a good basis.

    Greedy maximisation of the variance, weighted by `weights` (C,), that is explained when every
    channel outside the basis is rebuilt from its single best source. This objective is
    submodular, so a prefix reaches at least 1 - 1/e of the best basis of its size (Nemhauser et
    al. 1978).
    """
    explained = _explained_by_pairs(moments)
    explained.fill_diagonal_(0.0)
    explained += torch.diag(moments.yy)
    explained *= weights[:, None]
    assert bool(explained.isfinite().all())  # what is not would be looked at again without end
    best = torch.zeros(len(weights), dtype=torch.double)
    # What a channel adds only shrinks as the basis grows (submodularity), so that what it added
    # last time is a bound, and few channels need to be looked at again (Minoux 1978).
    sums = explained.sum(0).tolist()
    queue = [(-sums[channel], channel) for channel in among or range(len(sums))]
    heapq.heapify(queue)
    ranking: list[int] = []
    while queue:
        _, channel = queue[0]
        gain = float((explained[:, channel] - best).clamp(min=0).sum())
        heapq.heapreplace(queue, (-gain, channel))
        if queue[0][1] == channel:
            heapq.heappop(queue)
            ranking.append(channel)
            best = torch.maximum(best, explained[:, channel])
    return ranking


def _explained_by_pairs(moments: Moments) -> Tensor:
    """Variance of target c that the shifts of candidate b alone explain, (C targets, C)."""
    taps = moments.size**2
    candidates = len(moments.zz) // taps
    blocks = torch.stack(
        [
            moments.zz[b * taps : (b + 1) * taps, b * taps : (b + 1) * taps]
            for b in range(candidates)
        ]
    )
    cross = moments.zy.view(candidates, taps, -1)
    solution = torch.linalg.solve(_with_ridge(blocks, _floor(moments)), cross)
    return (solution * cross).sum(1).T.contiguous()


def _floor(moments: Moments) -> float:
    return FLOOR * float(moments.zz.diagonal().max()) + torch.finfo(torch.double).tiny ** 0.5


def _with_ridge(gram: Tensor, floor: float) -> Tensor:
    """Add a multiple of the mean variance, and `floor`, to the diagonal of (…, n, n)."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    return gram + torch.diag_embed((RIDGE * mean + floor).expand(gram.shape[:-1]))


@dataclass(frozen=True)
class Fit:
    """Sources and transformations of P rebuilt channels.

    sources: (P, S) positions in the basis; transforms: (P, S, m, m); bias: (P,); error: (P, S),
    the variance left when only the first s sources are used.
    """

    sources: Tensor
    transforms: Tensor
    bias: Tensor
    error: Tensor


def fit_transforms(moments: Moments, targets: list[int], sources: int) -> Fit:
    """Rebuild `targets` from the candidates of `moments` with `sources` sources each.

    Orthogonal matching pursuit over groups of m x m taps: each step adds, for every target, the
    candidate whose taps explain most of what is left, and solves the least-squares problem of all
    chosen taps anew. Means go into the bias.
    """
    taps = moments.size**2
    candidates = len(moments.zz) // taps
    gram = moments.zz
    cross = moments.zy[:, targets].T.contiguous()  # (P, candidates · taps)
    blocks = torch.stack(
        [gram[b * taps : (b + 1) * taps, b * taps : (b + 1) * taps] for b in range(candidates)]
    )
    floor = _floor(moments)
    factors = torch.linalg.cholesky(_with_ridge(blocks, floor))
    whitening = torch.linalg.solve_triangular(
        factors, torch.eye(taps, dtype=gram.dtype).expand_as(factors), upper=False
    )
    variance = moments.yy[targets]
    count = len(targets)
    chosen = torch.empty(count, 0, dtype=torch.long)
    residual = cross
    errors = []
    for _ in range(min(sources, candidates)):
        grouped = residual.view(count, candidates, taps).permute(1, 2, 0)
        whitened = whitening * grouped if taps == 1 else whitening @ grouped
        score = whitened.square().sum(1).T.scatter(1, chosen, -1.0)
        chosen = torch.cat([chosen, score.argmax(1, keepdim=True)], 1)
        rows = (chosen[:, :, None] * taps + torch.arange(taps)).reshape(count, -1)
        system = _with_ridge(gram[rows[:, :, None], rows[:, None, :]], floor)
        right = cross.gather(1, rows)
        solution = torch.linalg.solve(system, right[..., None])[..., 0]
        # The rows of the Gram matrix that are taken are few: a dense product would be mostly zeros.
        residual = cross - F.embedding_bag(rows, gram, per_sample_weights=solution, mode="sum")
        # E|y - t·z|² for any t, also where the ridge has moved it from the optimum
        error = variance - (solution * (right + residual.gather(1, rows))).sum(1)
        errors.append(error.clamp(min=0))
    bias = moments.y_mean[targets] - (solution * moments.z_mean[rows]).sum(1)
    return Fit(
        sources=chosen,
        transforms=solution.view(count, -1, moments.size, moments.size),
        bias=bias,
        error=torch.stack(errors, 1),
    )


def install(
    model: nn.Module,
    name: str,
    moments: Moments,
    kept: list[int],
    sources: int,
    macs: int = 0,
) -> SBFLayer:
    """Put a fitted SBF layer with the basis `kept` in the place of a convolution of `model`."""
    conv = convolution(model, name)
    size = moments.size
    rebuilt = sorted(set(range(conv.out_channels)) - set(kept))
    fit = fit_transforms(moments.restrict(kept), rebuilt, sources)
    left = moments.drift[kept].sum() + fit.error[:, -1].sum()
    layer = planned_layer(
        conv,
        kept,
        [[kept[position] for position in row] for row in fit.sources.tolist()],
        size=size,
        macs=macs,
        error=float(left / moments.yy.sum().clamp(min=1e-30)),
    )
    sbf = replace(model, name, layer)
    assert sbf.bias is not None
    sbf.transforms.copy_(fit.transforms)
    centre = size**2 // 2
    shift = moments.y_mean - moments.z_mean[centre :: size**2]
    sbf.bias[kept] = shift[kept].to(sbf.bias)
    sbf.bias[rebuilt] = fit.bias.to(sbf.bias)
    return layer


def planned_layer(
    conv: nn.Conv2d,
    kept: list[int],
    sources: list[list[int]],
    *,
    size: int,
    macs: int,
    error: float,
) -> SBFLayer:
    """Describe the SBF layer of `conv`, of `macs` multiply-adds; `error` is a share of variance."""
    per_filter, per_tap = filter_macs(conv, macs)
    taps = sum(map(len, sources)) * size**2
    return SBFLayer(
        channels=conv.out_channels,
        kept=kept,
        sources=sources,
        transform_size=size,
        macs_before=macs,
        macs_after=round(len(kept) * per_filter + taps * per_tap),
        error=round(error, 6),
        reason=(
            f"{len(kept)} of {conv.out_channels} filters kept, {len(sources[0])} sources: least "
            "estimated loss within the budget"
        ),
    )
