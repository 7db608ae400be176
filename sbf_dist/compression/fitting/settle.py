"""What follows the fit of all layers: batch norms and heads, each judged on images held out."""

from collections.abc import Mapping

from torch import Tensor, nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.fidelity import Judge, Wanted
from sbf_dist.compression.fitting.norms import compared_parts, move_batch_norms
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.refit import linear_heads, refit_heads
from sbf_dist.compression.fitting.resuming import Passes, Route, Side
from sbf_dist.compression.fitting.shelf import Shelf
from sbf_dist.compression.outputs import Yardstick


def settle(
    student: nn.Module,
    reference: Reference,
    images: Calibration,
    held: Calibration | None,
    *,
    refit: bool,
    yardstick: Yardstick,
    route: Route | None = None,
    priors: Mapping[str, Tensor] | None = None,
) -> Judge | None:
    """Move batch norm statistics and solve linear layers anew, in place, each if that is a gain.

    A step is kept only if the outputs for the images that are `held` out come nearer to the
    reference's by it, as `yardstick` measures. Where none are, nothing is changed, and None is
    returned. `route` says where passes can go on: what they come to before the first linear layer
    is not computed again. `priors` say how much the inputs of linear layers varied in training
    (`prior_variances`), where that has been measured.
    """
    if held is None:
        return None
    route = route or Route()
    heads = linear_heads(student, images.first(2)) if refit else []
    first = heads[0] if heads else None
    fit, apart = (Side.of(student, reference.module, x, route) for x in (images, held))
    given = apart.reference.outputs(first)
    wanted = Wanted.of(reference.module, held, yardstick, given)
    judge = Judge(student, wanted, apart.student.outputs(first))
    # Batch norms are everywhere: what the student has come to counts no more, if they move.
    moved = Side(Passes(student, held, route.student, Shelf(route.memory)), apart.reference)
    dense = fit.reference.outputs(first, compared_parts(images))
    if judge.keep_if_nearer(
        "Statistics of batch norms moved",
        lambda: move_batch_norms(student, reference, images, dense),
        moved.student.outputs(first),
    ):
        apart = moved
    if heads:
        judge.keep_if_nearer(
            "Linear layers solved anew",
            lambda: refit_heads(student, reference, images, (fit, apart), priors),
            apart.student.outputs(),
        )
    return judge
