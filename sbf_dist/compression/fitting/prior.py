"""What a network's batch norms say of the images that it was trained on.

Some hundred calibration images leave many channels of a trained network silent that other images
need. Whatever is solved, rebuilt or removed by what these images show alone gives such channels
away for nothing. The running statistics of batch norms remember how much each channel varied in
training: that is the prior by which channels count where the images say too little.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.statistics import Moments
from sbf_dist.hooks import on_input, registered
from sbf_dist.surgery import deep_copy, in_eval_mode

IMAGES = 128  # on which the variances are measured
SHOWN = 64  # on which their sum over all channels is
SHARE = 0.1  # of the calibration images: how many images the prior counts as


@torch.no_grad()
def prior_variances(
    model: nn.Module, names: Sequence[str], images: Calibration
) -> dict[str, Tensor]:
    """Return how much each input channel (C,) of layers would vary on the images of training.

    The network runs with batch norms that normalise each batch by itself, as they did in training:
    behind them, each channel has the mean and the variance that it had then, whatever the images.
    Each layer's variances are scaled so that their sum is that on the images at hand: batch norms
    tell channels apart, not images. Where there are no running statistics, or less than two images,
    nothing is known, and no layer is returned.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms or images.count < 2 or not names:
        return {}
    twin = in_eval_mode(deep_copy(model))
    shown = _input_variances(twin, names, images, SHOWN)
    for module in twin.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.train()
    trained = _input_variances(twin, names, images, IMAGES)
    return {
        name: variance * (shown[name].sum() / variance.sum().clamp(min=1e-30))
        for name, variance in trained.items()
    }


def _input_variances(
    model: nn.Module, names: Sequence[str], images: Calibration, most: int
) -> dict[str, Tensor]:
    sums: dict[str, list[Tensor]] = {}

    def add(name: str, axis: int) -> Callable[..., None]:
        def hook(_: nn.Module, features: Tensor) -> None:
            others = [a for a in range(features.ndim) if a != axis % features.ndim]
            variance, mean = (
                found.double() for found in torch.var_mean(features, others, correction=0)
            )
            rows = mean.new_tensor(features.numel() // len(mean))
            now = [rows, rows * mean, rows * (variance + mean.square())]
            old = sums.get(name)
            sums[name] = now if old is None else [a + b for a, b in zip(old, now, strict=True)]

        return hook

    layers = {name: model.get_submodule(name) for name in names}
    hooks = (
        on_input(layer, add(name, -1 if isinstance(layer, nn.Linear) else 1))
        for name, layer in layers.items()
    )
    with registered(hooks):
        for batch in images.parts(images.part, most):
            model(batch)
    return {
        name: (squares / rows - (total / rows).square()).clamp(min=0).cpu()
        for name, (rows, total, squares) in sums.items()
    }


def floored(variance: Tensor, prior: Tensor | None) -> Tensor:
    """Return variances (C,), none of which is smaller than the prior's."""
    return variance if prior is None else torch.maximum(variance, prior)


def with_prior(moments: Moments, weight: Tensor, prior: Tensor | None) -> Moments:
    """Add to the moments of a layer's outputs what its filters would give on other images.

    weight: (C, C_in / groups, k, k); prior: (C_in,), of the layer's inputs, which are taken to be
    independent of each other and of their neighbours. Counts as SHARE of the images. The moments
    given are used up.
    """
    if prior is None:
        return moments
    filters = weight.detach().double().cpu()
    # A channel of a group reads the inputs of its own.
    groups = len(prior) // filters.shape[1]
    scale = prior.sqrt().view(groups, 1, -1, 1, 1)
    rows = (filters.unflatten(0, (groups, -1)) * scale).flatten(2)
    added = SHARE * torch.block_diag(*(rows @ rows.mT))
    taps = moments.size**2
    zz = moments.zz.view(len(added), taps, len(added), taps)
    for tap in range(taps):
        zz[:, tap, :, tap] += added
    moments.zy.view(len(added), taps, len(added))[:, taps // 2] += added
    moments.yy += added.diagonal()
    return moments
