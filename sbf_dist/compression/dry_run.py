"""Running a network on one image for what a forward pass tells, computing nothing if possible."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from sbf_dist.compression.calibration import device_of, dtype_of
from sbf_dist.surgery import deep_copy, in_eval_mode

logger = logging.getLogger(__name__)

T = TypeVar("T")


def dry_run(
    model: nn.Module,
    input_shape: tuple[int, ...],
    run: Callable[[nn.Module, Tensor], T],
    image: Tensor | None = None,
) -> T:
    """Return `run` of a copy of `model`, in eval mode, and of one image (1, C, H, W).

    Copy and image are on the meta device first, where nothing is computed. Where that fails, as it
    does for code that makes tensors of its own, calls .item() or branches on values, both are on
    the network's own device: `image`, or random numbers if that is None. In either case the image
    has the network's own dtype. Raises what `run` raises there.
    """
    dtype = dtype_of(model)
    with torch.no_grad():
        try:
            on_meta = torch.empty(1, *input_shape, device="meta", dtype=dtype)
            return run(in_eval_mode(deep_copy(model)).to("meta"), on_meta)
        except Exception as error:  # whatever the network's own code raises without values
            logger.debug("%s needs a real image: %s", type(model).__name__, error)
        if image is None:
            image = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0))
        return run(in_eval_mode(deep_copy(model)), image[:1].to(device_of(model), dtype))
