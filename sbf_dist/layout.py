"""Memory layouts of images, and networks whose own code cannot take all of them."""

import logging

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


@torch.no_grad()
def needs_contiguous(model: nn.Module, images: Tensor) -> bool:
    """Tell whether `model` fails on `images` (N, C, H, W) as they lie, but not if contiguous.

    So do networks with `x.view(x.size(0), -1)` behind a convolution, whose features lie as the
    images do, in channels_last. What fails either way is for the caller to find.
    """
    if images.is_contiguous():
        return False
    try:
        model(images)
    except RuntimeError as error:
        logger.debug("%s, images not contiguous: %s", type(model).__name__, error)
    else:
        return False
    try:
        model(images.contiguous())
    except Exception as error:  # whatever the network's own code raises
        logger.debug("%s, images contiguous: %s", type(model).__name__, error)
        return False
    return True
