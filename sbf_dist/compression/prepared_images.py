"""Calibration images as a network is fitted to them: in its type and layout, in an even order."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sbf_dist.compression.calibration import Calibration, Images, check_images, device_of, dtype_of
from sbf_dist.compression.holding_out import groups_of
from sbf_dist.compression.inputs import Packing, number_of_inputs
from sbf_dist.errors import UserError
from sbf_dist.layout import needs_contiguous, prefers_channels_last

GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly, however many are taken


def calibration_for(model: nn.Module, images: Images) -> Calibration:
    """Return `images` on the device, in the floating-point type and the layout of `model`.

    They come in an order of which any first images are of all places (`spread`): images of a class
    or a film are usually neighbours, and much is measured on the first hundred. A network whose
    forward pass needs several inputs takes them packed from here on; its batches must be tuples
    that begin with them.
    """
    device, dtype, packing = device_of(model), dtype_of(model), _packing_for(model, images)
    if isinstance(images, Calibration) and images.packing is None and packing is not None:
        calibration = Calibration(
            images.batches, device=device, dtype=dtype, sources=images.sources, packing=packing
        )
    else:
        calibration = Calibration.of(images, device=device, dtype=dtype, packing=packing)
    if calibration.packing is not None:
        calibration.packing.install(model)
    calibration = spread(calibration)
    image = calibration.first(1)
    if needs_contiguous(model, image):
        return calibration.contiguous()
    if prefers_channels_last(model, image):
        return calibration.channels_last()
    return calibration


def spread(images: Calibration) -> Calibration:
    """Return images in an order of which the first, however many, are taken evenly from all."""
    if images.is_spread:
        return images
    places = GOLDEN * torch.arange(images.count, dtype=torch.double) % 1
    spread = images.in_order(places.argsort().argsort().tolist(), groups_of(images))
    spread.is_spread = True
    return spread


def _packing_for(model: nn.Module, images: Images) -> Packing | None:
    """Return how the first inputs of the batches are packed; None for a network of one."""
    wanted = number_of_inputs(model)
    if isinstance(images, Calibration) and images.packing is not None:
        if len(images.packing.shapes) < wanted:
            raise UserError(
                f"calibration images: {type(model).__name__} takes {wanted} inputs, and "
                f"{len(images.packing.shapes)} are packed"
            )
        return images.packing
    if wanted == 1:
        return None
    batches = images.batches if isinstance(images, Calibration) else images
    first = None if isinstance(batches, Tensor | Iterator) else next(iter(batches), None)
    if not isinstance(first, list | tuple) or len(first) < wanted:
        raise UserError(
            f"calibration images: {type(model).__name__} takes {wanted} inputs; give batches that "
            "are tuples of so many tensors, the images first"
        )
    check_images(first[0])
    for tensor in first[1:wanted]:
        if not isinstance(tensor, Tensor) or tensor.ndim == 0:
            raise UserError(
                f"calibration images: {type(model).__name__} takes {wanted} inputs, and a batch "
                f"has a {type(tensor).__name__} among its first {wanted}"
            )
    return Packing.of(first[:wanted])
