"""Networks that are rebuilt, and how far they are from what they were."""

import torch
import torch.nn.functional as F
from small_networks import pictures

from sbf_dist.compression.reconstruct import rebuild
from sbf_dist.settings import Compression

CALL = ("seed", "progress", "reference")  # what is no setting


def shrink(model, images=None, *, macs=0.5, **settings):
    images = pictures() if images is None else images
    call = {key: settings.pop(key) for key in CALL if key in settings}
    return rebuild(model, images, Compression(macs=macs, **settings), name="small", **call)


def divergence(model, student, images):
    """KL(model || student) of the predictions."""
    with torch.no_grad():
        return F.kl_div(
            student(images).log_softmax(1),
            model(images).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        ).item()
