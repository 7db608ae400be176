"""Keeps trainings on a CPU from a kernel of oneDNN's that writes past its buffer.

The gradient of the weights of a strided 1 x 1 convolution with fewer input channels than a vector
register holds numbers (16 with AVX-512), of an input in channels_last, is wrong, and damages other
memory: https://github.com/uxlfoundation/oneDNN/issues/6035. Contiguous inputs take another kernel.
"""

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sbf_dist.hooks import on_input, same_values
from sbf_dist.layout import contiguous

_FEWEST = 16  # input channels of a group that are safe with all of oneDNN's kernels


def keep_inputs_contiguous(model: nn.Module) -> list[RemovableHandle]:
    """Let the convolutions of `model` that would meet the kernel make their inputs contiguous.

    Only where their weights get gradients: inference is as before. Returns the handles of hooks.
    """
    return [
        on_input(module, _contiguous)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < _FEWEST
    ]


@same_values
def _contiguous(conv: nn.Module, images: Tensor) -> Tensor | None:
    if not isinstance(images, Tensor) or images.device.type != "cpu":
        return None
    if not torch.is_grad_enabled() or not conv.weight.requires_grad:
        return None
    return contiguous(images)
