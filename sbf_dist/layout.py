"""Memory layouts of images, and networks whose own code cannot take all of them."""

import logging

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3  # of the largest output: other kernels add in another order


def lay_out_in_channels_last(model: nn.Module) -> None:
    """Lay parameters and buffers of four axes, in place, out in channels_last.

    `Module.to` would change those of five axes too, and PyTorch has no such layout for them.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def contiguous(images: Tensor) -> Tensor:
    """Return `images` contiguous, by their strides as well.

    Those of one channel that lie in channels_last are both, and `Tensor.contiguous` leaves them as
    they are; but convolutions go by the strides, and give features in channels_last.
    """
    return images.contiguous().to(memory_format=torch.contiguous_format)


@torch.no_grad()
def can_take(model: nn.Module, images: Tensor) -> bool:
    """Tell whether `model` takes `images` (N, C, H, W) as they lie."""
    try:
        model(images)
    except Exception as error:  # whatever the network's own code raises
        logger.debug("%s, images of strides %s: %s", type(model).__name__, images.stride(), error)
        return False
    return True


def needs_contiguous(model: nn.Module, images: Tensor) -> bool:
    """Tell whether `model` fails on `images` (N, C, H, W) as they lie, but not if contiguous.

    So do networks with `x.view(x.size(0), -1)` behind a convolution, whose features lie as the
    images do, in channels_last. What fails either way is for the caller to find.
    """
    plain = contiguous(images)
    if plain.stride() == images.stride():
        return False
    return not can_take(model, images) and can_take(model, plain)


@torch.no_grad()
def prefers_channels_last(model: nn.Module, images: Tensor) -> bool:
    """Tell whether `model`, in eval mode, computes the same faster with channels_last `images`.

    Depthwise convolutions on a CPU are several times as fast then, and features lie as the images
    do. Both are tried: the network's own code may ask for another layout.
    """
    depthwise = any(
        isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
        for module in model.modules()
    )
    if not depthwise or images.device.type != "cpu":
        return False
    if images.ndim != 4 or not images.is_contiguous():
        return False
    try:
        expected = tree_leaves(model(images))
        found = tree_leaves(model(images.to(memory_format=torch.channels_last)))
    except Exception as error:  # whatever the network's own code raises
        logger.debug("%s in channels_last: %s", type(model).__name__, error)
        return False
    return len(found) == len(expected) and all(map(_are_alike, found, expected))


def _are_alike(found: object, expected: object) -> bool:
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return False  # it cannot be known
    if found.shape != expected.shape or not bool(expected.isfinite().all()):
        return False
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=0, atol=TOLERANCE * scale)
