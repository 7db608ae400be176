"""Filters solved anew by least squares, on the inputs that a converted network really gives.

What the layers before a convolution have spoiled is mended by its own filters as far as these can:
they are fitted to what the dense network's layer gives, whatever their inputs now are.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.compress.candidates import LARGEST_GRAM, convolution
from sbf_dist.compress.layerwise import Draw
from sbf_dist.compress.statistics import Moments, MomentSums, patches

RIDGE = 1e-2  # towards the old filters, relative to the mean variance of the inputs


def obstacle(conv: nn.Conv2d) -> str | None:
    """Tell why the filters of `conv` cannot be solved anew, if they cannot."""
    if conv.groups > 1:
        return f"grouped convolution ({conv.groups} groups)"
    width = conv.weight[0].numel()
    if width > LARGEST_GRAM:
        return f"a filter has {width} weights, more than {LARGEST_GRAM}"
    return None


def is_mended(model: nn.Module, name: str, images: Tensor) -> bool:
    """Tell whether a layer that stays dense can profit: not the stem, which reads the images."""
    conv = convolution(model, name)
    return conv.in_channels != images.shape[1] and obstacle(conv) is None


@torch.no_grad()
def refit_filters(
    conv: nn.Conv2d,
    batches: Iterable[tuple[int, Tensor, Tensor]],
    draw: Draw,
    *,
    centred: bool,
) -> None:
    """Fit weight and bias of `conv`, in place, to targets on the inputs that it gets.

    `batches` give the number of the first image, inputs (N, C, H, W), and the rows (n, C') of
    targets at the positions of `draw`. Of all filters that explain the targets equally well the
    nearest to the old ones are taken. With `centred`, means are left to a bias (which is set if
    `conv` has one); else the filters have to explain them too.
    """
    sums = MomentSums(1, paired=False)
    for start, inputs, targets in batches:
        sums.add(drawn_patches(conv, inputs, draw, start), targets)
    weight, bias = solve(sums.moments(), conv.weight, centred=centred)
    conv.weight.copy_(weight)
    if centred and conv.bias is not None:
        conv.bias.copy_(bias)


def drawn_patches(conv: nn.Conv2d, inputs: Tensor, draw: Draw, start: int) -> Tensor:
    """Lay out what the filters of `conv` see at the positions of `draw` as rows (n, C·k·k)."""
    inputs = inputs[: max(0, draw.images - start)]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(inputs, conv._reversed_padding_repeated_twice, mode)
    sizes = [
        (side - d * (k - 1) - 1) // s + 1
        for side, k, s, d in zip(
            padded.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True
        )
    ]
    positions = draw.positions(start, len(inputs), sizes[0] * sizes[1])
    return patches(padded, conv.kernel_size, positions, conv.stride, conv.dilation)  # type: ignore[arg-type]


def solve(moments: Moments, weight: Tensor, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Return weight and bias that explain the targets of `moments`, near to the old `weight`."""
    old = weight.detach().flatten(1).double().cpu()
    gram, cross = moments.zz, moments.zy
    if not centred:
        gram = gram.addr(moments.z_mean, moments.z_mean)
        cross = cross.addr(moments.z_mean, moments.y_mean)
    ridge = RIDGE * gram.diagonal().mean() + torch.finfo(torch.double).tiny ** 0.5
    left = cross - gram @ old.T
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=torch.double))
    new = old + torch.cholesky_solve(left, factor).T
    return new.view_as(weight), moments.y_mean - new @ moments.z_mean
