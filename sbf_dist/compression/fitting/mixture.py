"""Layers whose rebuilt channels are mixtures of all basis features: S = B, m = 1.

The outputs of such a layer lie in a space of B dimensions, and any B channels that span it can be
kept. So the space is chosen first, by reduced-rank regression (Izenman 1975), with basis filters
that are combinations of all the old ones; then the channels that are its best conditioned
coordinates, by a pivoted QR factorisation (interpolative decomposition: Cheng et al. 2005, On the
compression of low rank matrices). A low-rank factorisation of rank B gives the same outputs, but
has all channels to make of its B features: kept channels cost no more than their filters.
"""

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor, nn

from sbf_dist.compression.candidates import convolution
from sbf_dist.compression.convert import replace
from sbf_dist.compression.fitting.statistics import Moments
from sbf_dist.compression.fitting.transforms import planned_layer
from sbf_dist.compression.plan import SBFLayer

RIDGE = 1e-6  # of the variance of each candidate
# To choose from on images that are held out; the last takes the candidates as they are.
RIDGES = (RIDGE, 1e-2, 1e-1, 1.0, math.inf)
# Of the largest variance of a channel: what the single precision of images leaves of none.
RANK = 1e-6
LOW = 0.75  # share of the channels up to which a smaller rank is made use of
LEAST_WEIGHT = 1e-3  # of the mean: what hardly matters is still to be rebuilt
LEAST_VARIANCE = 1e-3  # of the mean: channels that vary less are no coordinates to choose first


@dataclass(frozen=True)
class Mixture:
    """Basis features that are combinations of candidates, and rebuilt channels that mix them.

    kept: B channels, ascending; basis: (B, candidates); transforms: (P, B); bias: (C,); matrix:
    (C, candidates), all of the outputs from the candidates; error: (C,), the variance left.
    """

    kept: list[int]
    basis: Tensor
    transforms: Tensor
    bias: Tensor
    matrix: Tensor
    error: Tensor


class MixtureSpace:
    """The regression of targets on candidates, of which each number of dimensions is the best.

    `moments` have m = 1; squared errors count by `weights` (C,). Each target has a candidate, which
    it is taken to be but for what the images say; the larger `ridge`, the less these count.
    """

    def __init__(self, moments: Moments, weights: Tensor, ridge: float = RIDGE) -> None:
        self._moments = moments
        weights = weights.double()
        self._scale = weights.clamp(min=LEAST_WEIGHT * float(weights.mean())).add(1e-30).sqrt()
        factor = _factor(self._scale[:, None] * moments.zz * self._scale)
        # What fewer inputs than channels give lies in a space of their number.
        self._factor = factor if factor.shape[1] <= LOW * len(self._scale) else None
        self._regress(ridge)

    def with_ridge(self, ridge: float) -> "MixtureSpace":
        """Return the space of the same moments and weights with another ridge."""
        other = copy.copy(self)
        other._regress(ridge)
        return other

    def _regress(self, ridge: float) -> None:
        # Where each target is its candidate, the matrix is the identity: no products with it.
        self._matrix = _regression(self._moments, ridge) if ridge < math.inf else None
        self._values, self._vectors = self._decomposed()

    def losses(self) -> Tensor:
        """Return the weighted error (C + 1,) that 0, 1, … C dimensions leave."""
        total = (self._scale.square() * self._moments.yy).sum()
        explained = torch.zeros(len(self._scale) + 1, dtype=torch.double)
        explained[1 : len(self._values) + 1] = self._values
        return (total - explained.cumsum(0)).clamp(min=0)

    def error_on(self, moments: Moments, kept: int) -> float:
        """Return the weighted error on other moments that `kept` dimensions leave."""
        span, inner = self._maps(kept)
        shift = moments.y_mean - self._moments.y_mean
        shift = shift - span @ (inner @ (moments.z_mean - self._moments.z_mean))
        left = moments.yy - _explained(span, inner, moments) + shift.square()
        return float((self._scale.square() * left).sum())

    def fit(self, kept: int, among: Collection[int] | None = None) -> Mixture:
        """Return the mixture of `kept` dimensions; `among` are the channels that may be kept."""
        moments = self._moments
        span, inner = self._maps(kept)
        chosen = self._coordinates(span, among)
        others = sorted(set(range(len(span))) - set(chosen))
        transforms = _solved(span[chosen].T, span[others].T).T
        matrix = span @ inner
        return Mixture(
            kept=chosen,
            basis=matrix[chosen],
            transforms=transforms,
            bias=moments.y_mean - matrix @ moments.z_mean,
            matrix=matrix,
            error=(moments.yy - _explained(span, inner, moments)).clamp(min=0),
        )

    def _maps(self, kept: int) -> tuple[Tensor, Tensor]:
        """Return (C, B) from `kept` dimensions to outputs, and (B, C) from candidates to these."""
        leading = self._leading(kept)
        inner = leading.T * self._scale
        if self._matrix is not None:
            inner = inner @ self._matrix
        return leading / self._scale[:, None], inner

    def _leading(self, kept: int) -> Tensor:
        """The `kept` directions, orthonormal columns, that explain most of the scaled outputs."""
        if kept > self._vectors.shape[1]:
            self._values, self._vectors = _largest_first(self._of_outputs())
        return self._vectors[:, :kept]

    def _of_outputs(self) -> Tensor:
        explained = self._moments.zz
        if self._matrix is not None:
            explained = self._matrix @ explained @ self._matrix.T
        return self._scale[:, None] * explained * self._scale

    def _decomposed(self) -> tuple[Tensor, Tensor]:
        """Variances, the largest first, and the directions that have them.

        Where candidates lie in a small space, other directions are left out, for a small part of
        the time.
        """
        if self._factor is None:
            return _largest_first(self._of_outputs())
        outputs = self._factor
        if self._matrix is not None:
            outputs = self._scale[:, None] * (self._matrix @ (outputs / self._scale[:, None]))
        basis, inner = torch.linalg.qr(outputs)
        values, vectors = _largest_first(inner @ inner.T)
        return values, basis @ vectors

    def _coordinates(self, span: Tensor, among: Collection[int] | None) -> list[int]:
        rows = span * self._values[: span.shape[1]].clamp(min=1e-12 * self._values[0]).sqrt()
        variance = rows.square().sum(1, keepdim=True)
        rows = rows / (variance + LEAST_VARIANCE * variance.mean() + 1e-30).sqrt()
        allowed = sorted(among) if among is not None else list(range(len(rows)))
        _, pivots = scipy.linalg.qr(rows[allowed].T.numpy(), mode="r", pivoting=True)
        return sorted(allowed[pivot] for pivot in pivots[: span.shape[1]])


def best_space(fit: Moments, held: Moments, weights: Tensor, kept: int) -> MixtureSpace:
    """Return the space fitted to `fit` whose ridge leaves the least error on `held`.

    From the largest down, up to where the error grows.
    """
    best = MixtureSpace(fit, weights, RIDGES[-1])
    least = best.error_on(held, kept)
    for ridge in reversed(RIDGES[:-1]):  # of equals the one that changes the least
        space = best.with_ridge(ridge)
        lost = space.error_on(held, kept)
        if lost < least:
            best, least = space, lost
        elif lost > least:
            break
    return best


def _regression(moments: Moments, ridge: float) -> Tensor:
    """Return the matrix (C, C) of all outputs from the candidates, near to the identity."""
    variance = moments.zz.diagonal()
    added = ridge * variance + RIDGE * variance.mean()
    gram = moments.zz.clone()
    gram.diagonal().add_(added.clamp(min=torch.finfo(torch.double).tiny ** 0.5))
    missing = moments.zy - moments.zz
    lower, failed = torch.linalg.cholesky_ex(gram)
    if int(failed) == 0:
        found = torch.cholesky_solve(missing, lower)
    else:
        # Moments are of images in single precision: with the least ridge, rounding may leave them
        # with negative variances.
        found = torch.linalg.solve(gram, missing)
    matrix = found.T
    matrix.diagonal().add_(1)
    return matrix


def _explained(span: Tensor, inner: Tensor, moments: Moments) -> Tensor:
    """Return the variance (C,) of targets that the matrix `span` @ `inner` explains."""
    crossed = (span * (inner @ moments.zy).T).sum(1)
    return 2 * crossed - ((span @ (inner @ moments.zz @ inner.T)) * span).sum(1)


def _largest_first(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _factor(matrix: Tensor) -> Tensor:
    """Return F (C, rank) with F Fᵀ = `matrix`, by a Cholesky factorisation with pivots."""
    least = RANK * float(matrix.diagonal().max())
    lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(matrix.numpy(), tol=least, lower=1)
    factor = torch.zeros(len(matrix), rank, dtype=torch.double)
    factor[torch.from_numpy(pivots).long() - 1] = torch.from_numpy(lower).tril()[:, :rank]
    return factor


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve a system, in the least-squares sense where channels are dead and it is singular."""
    solution, failed = torch.linalg.solve_ex(matrix, right)
    if int(failed) == 0 and bool(solution.isfinite().all()):
        return solution
    return torch.linalg.lstsq(matrix, right, driver="gelsd").solution


def install_mixture(
    model: nn.Module, name: str, mixture: Mixture, moments: Moments, macs: int = 0
) -> SBFLayer:
    """Put the SBF layer of a mixture of a convolution's own outputs, without bias, in its place."""
    conv = convolution(model, name)
    filters = conv.weight.double().cpu().flatten(1)
    kept = mixture.kept
    layer = planned_layer(
        conv,
        kept,
        [kept] * (conv.out_channels - len(kept)),
        size=1,
        macs=macs,
        error=float(mixture.error.sum() / moments.yy.sum().clamp(min=1e-30)),
    )
    sbf = replace(model, name, layer)
    assert sbf.bias is not None
    sbf.basis.weight.copy_((mixture.basis @ filters).view_as(sbf.basis.weight))
    sbf.transforms.copy_(mixture.transforms[:, :, None, None])
    sbf.bias.copy_(mixture.bias)
    return layer
