"""Low-rank factorisation: a convolution to r channels, and a 1 × 1 convolution back to all."""

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn

from sbf_dist.budget import Budget
from sbf_dist.compression.calibration import Images
from sbf_dist.compression.candidates import convolution, find_candidates
from sbf_dist.compression.cost import count
from sbf_dist.compression.fitting.layerwise import gather_layers
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.resuming import Route
from sbf_dist.compression.fitting.sequential import SequentialFit
from sbf_dist.compression.fitting.statistics import Moments
from sbf_dist.compression.planning.knapsack import Option, allocate
from sbf_dist.compression.prepared_images import calibration_for
from sbf_dist.compression.recognition import make_all_plain
from sbf_dist.errors import UserError
from sbf_dist.padding import PaddedConv2d, pad_of
from sbf_dist.peers.batch_norms import Statistics, settle_batch_norms
from sbf_dist.surgery import deep_copy, in_eval_mode

Basis = Literal["filters", "responses"]
RIDGE = 1e-6  # of the mean variance
FEATURES = 512 * 2**20  # bytes of features that are kept between passes


class LowRankConv2d(nn.Sequential):
    """k × k convolution to `rank` channels, then 1 × 1 with the bias."""

    def __init__(self, conv: nn.Conv2d, rank: int) -> None:
        pad = pad_of(conv)
        first = nn.Conv2d(
            conv.in_channels,
            rank,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            bias=False,
            padding_mode=conv.padding_mode,
        )
        if pad is not None:
            first = PaddedConv2d(first, copy.deepcopy(pad))
        super().__init__(first, nn.Conv2d(rank, conv.out_channels, 1))
        self.to(conv.weight)

    @torch.no_grad()
    def set(self, reduce: Tensor, expand: Tensor, bias: Tensor) -> None:
        """Give it reduce (r, C_in, k, k), expand (C_out, r) and bias (C_out,)."""
        first, second = self
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        assert second.bias is not None
        first.weight.copy_(reduce)
        second.weight.copy_(expand[..., None, None])
        second.bias.copy_(bias)


@torch.no_grad()
def low_rank(
    model: nn.Module,
    macs_share: float,
    images: Images,
    *,
    basis: Basis = "responses",
    statistics: Statistics = "measured",
) -> nn.Module:
    """Factorise the convolutions of `model` to reach `macs_share` of its multiply-adds.

    "filters" is the truncated SVD of the filters, (C_out, C_in·k·k), without data. "responses"
    keeps what matters on `images` (N, C, H, W), calibration images: the layers are taken in
    forward order, and each is the best approximation of rank r, in the mean square, of the dense
    layer's responses from the inputs that the factorised layers before it give (Zhang et al. 2015,
    arXiv 1505.06798, sections 3.1 and 3.3). The ranks maximise the product of the layers' kept
    energies within the budget (section 3.2 there, solved as a knapsack instead of greedily). The
    stem stays dense, and so does what would not get cheaper. Batch norm is measured again, or moved
    (`statistics`). Returns the network in eval mode. UserError if the budget cannot be met.
    """
    dense = in_eval_mode(deep_copy(model))
    make_all_plain(dense)
    calibration = calibration_for(dense, images)
    cost = count(dense, calibration.shape)
    _, candidates = find_candidates(dense, calibration.first(2), 1)
    names = [name for name in candidates if convolution(dense, name).groups == 1]
    if not names:
        raise UserError("low-rank: the network has no convolution that could be factorised")
    fixed = cost.macs - sum(cost.layers[name] for name in names)
    sizes = dict.fromkeys(names, 1)
    if basis == "filters":
        energies = {
            name: torch.linalg.svdvals(convolution(dense, name).weight.double().flatten(1)).square()
            for name in names
        }
    else:
        energies = {
            name: torch.linalg.eigvalsh(moments.zz).flip(0).clamp(min=0)
            for name, moments in gather_layers(dense, sizes, calibration)
        }
    choices = {
        name: _ranks(convolution(dense, name), cost.layers[name], energies[name]) for name in names
    }
    ranks = allocate(choices, fixed=fixed, dense=cost.macs, budget=Budget(macs=macs_share))
    student, reference = deep_copy(dense), Reference(dense)
    route = Route.of(student, dense, calibration.first(3), names, FEATURES)
    fit = SequentialFit(student, reference, sizes, calibration, refit=False, route=route)
    for name in names:
        rank = ranks[name].kept
        conv = convolution(dense, name)
        if rank == conv.out_channels:
            fit.skip(name)
            continue
        layer = LowRankConv2d(conv, rank)
        if basis == "filters":
            layer.set(*truncated_svd(conv, rank))
        else:
            layer.set(*reduced_regression(conv, rank, fit.moments(name)))
        student.set_submodule(name, layer, strict=True)
    settle_batch_norms(student, reference, calibration, statistics)
    return student


def truncated_svd(conv: nn.Conv2d, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest filters of rank `rank`, as (r, C_in, k, k) and (C_out, r), and the bias."""
    u, s, v = torch.linalg.svd(conv.weight.double().flatten(1), full_matrices=False)
    root = s[:rank].sqrt()
    reduce = (root[:, None] * v[:rank]).view(-1, *conv.weight.shape[1:])
    reduce, expand = _padded(reduce, u[:, :rank] * root, rank)
    return reduce, expand, _bias(conv).double()


def reduced_regression(
    conv: nn.Conv2d, rank: int, moments: Moments
) -> tuple[Tensor, Tensor, Tensor]:
    """The regression of rank `rank` of the targets y on z = conv(x) without its bias.

    With y ≈ M z + c by least squares, the best approximation of rank r projects M z on the leading
    eigenvectors of its covariance (Izenman 1975, reduced-rank regression).
    """
    device = conv.weight.device
    trace = moments.zz.diagonal().mean()
    ridge = (RIDGE * trace).clamp(min=1e-30) * torch.eye(len(moments.zz)).double()
    matrix = torch.linalg.solve(moments.zz + ridge, moments.zy).T
    _, vectors = torch.linalg.eigh(matrix @ moments.zz @ matrix.T)
    leading = vectors.flip(1)[:, :rank]
    inner = leading.T @ matrix
    bias = moments.y_mean - leading @ (inner @ moments.z_mean)
    filters = (inner.to(device) @ conv.weight.double().flatten(1)).view(-1, *conv.weight.shape[1:])
    return filters, leading.to(device), bias.to(device)


def _padded(reduce: Tensor, expand: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Fill up with zeros: small filters have fewer singular values than channels."""
    lacking = rank - len(reduce)
    if lacking <= 0:
        return reduce, expand
    return (
        torch.cat([reduce, reduce.new_zeros(lacking, *reduce.shape[1:])]),
        torch.cat([expand, expand.new_zeros(len(expand), lacking)], 1),
    )


def _bias(conv: nn.Conv2d) -> Tensor:
    return conv.bias if conv.bias is not None else conv.weight.new_zeros(conv.out_channels)


def _ranks(conv: nn.Conv2d, macs: int, energies: Tensor) -> list[Option]:
    """The dense layer, and every rank at which the layer is cheaper."""
    per_pixel = conv.weight.numel()
    of_rank = conv.weight[0].numel() + conv.out_channels
    kept = energies.cumsum(0) / energies.sum().clamp(min=1e-30)
    choices = [Option(kept=conv.out_channels, sources=0, size=1, cost=macs, loss=0.0)]
    for rank in range(1, math.ceil(per_pixel / of_rank)):
        share = float(kept[min(rank, len(kept)) - 1].clamp(min=1e-12, max=1.0))
        price = macs * rank * of_rank / per_pixel
        choices.append(Option(kept=rank, sources=1, size=1, cost=price, loss=-math.log(share)))
    return choices
