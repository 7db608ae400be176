"""What follows the fit of all layers: batch norms and heads, each judged on images held out."""

from torch import nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.fidelity import Judge
from sbf_dist.compression.fitting.norms import move_batch_norms
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.refit import refit_heads
from sbf_dist.compression.outputs import Yardstick


def settle(
    student: nn.Module,
    reference: Reference,
    images: Calibration,
    held: Calibration | None,
    *,
    refit: bool,
    yardstick: Yardstick,
) -> Judge | None:
    """Move batch norm statistics and solve linear layers anew, in place, each if that is a gain.

    A step is kept only if the outputs for the images that are `held` out come nearer to the
    reference's by it, as `yardstick` measures. Where none are, nothing is changed, and None is
    returned.
    """
    if held is None:
        return None
    judge = Judge(student, reference, held, yardstick)
    judge.keep_if_nearer(
        "Statistics of batch norms moved", lambda: move_batch_norms(student, reference, images)
    )
    if refit:
        judge.keep_if_nearer(
            "Linear layers solved anew", lambda: refit_heads(student, reference, images, held)
        )
    return judge
