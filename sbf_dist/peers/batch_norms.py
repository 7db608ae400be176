"""The statistics of a peer's batch norms, once its layers are what they are to be."""

from typing import Literal

from torch import nn

from sbf_dist.compression.calibration import BATCH, Calibration
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.settle import settle
from sbf_dist.compression.fitting.statistics import measure_batch_norm
from sbf_dist.compression.holding_out import split
from sbf_dist.compression.outputs import Yardstick
from sbf_dist.settings import Compression

Statistics = Literal["measured", "moved"]


def settle_batch_norms(
    network: nn.Module, reference: Reference, images: Calibration, statistics: Statistics
) -> None:
    """Give batch norms their statistics, in place, and leave `network` in eval mode.

    "measured": on `images`, as is usual before a training. "moved": by what their inputs have
    changed, if images held out gain by it, as SBF networks have it.
    """
    if statistics == "measured":
        measure_batch_norm(network, images, BATCH)
        return
    network.eval()
    # How outputs are compared unless it is asked for otherwise; a budget is not looked at.
    yardstick = Yardstick.of(reference.module, images, Compression(macs=1.0))
    fitted, held = split(images)
    settle(network, reference, fitted, held, refit=False, yardstick=yardstick)
