"""What follows the fit of all layers: batch norms and heads, each judged on images held out."""

from collections.abc import Mapping

from torch import Tensor, nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.fidelity import Judge, Wanted
from sbf_dist.compression.fitting.norms import move_batch_norms
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.refit import linear_heads, refit_heads
from sbf_dist.compression.fitting.resuming import Passes, Route, Side
from sbf_dist.compression.fitting.sequential import SequentialFit
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
    priors: Mapping[str, Tensor] | None = None,
    fit: SequentialFit | None = None,
) -> Judge | None:
    """Move batch norm statistics and solve linear layers anew, in place, each if that is a gain.

    A step is kept only if the outputs for the images that are `held` out come nearer to the
    reference's by it, as `yardstick` measures. Where none are, nothing is changed, and None is
    returned. `priors` say how much the inputs of linear layers varied in training
    (`prior_variances`), where that has been measured. What `fit`, that of the other layers on the
    same images, has come to is not computed again.
    """
    if held is None:
        return None
    route = Route() if fit is None else fit.route
    begun = (None, None) if fit is None else fit.sides
    heads = linear_heads(student, images.first(2)) if refit else []
    first = heads[0] if heads else None

    def gone_on(side: Side | None, these: Calibration) -> Side:
        if side is not None and side.is_before(first):
            return side
        return Side.of(student, reference.module, these, route)

    def anew(side: Side, these: Calibration) -> Side:
        passes = Passes(student, these, route.student, Shelf(route.memory))
        return Side(passes, side.reference)

    seen, apart = gone_on(begun[0], images), gone_on(begun[1], held)
    wanted = Wanted.of(reference.module, held, yardstick, apart.reference.outputs(first))
    judge = Judge(student, wanted, apart.student.outputs(first))
    # Batch norms are everywhere: what the student has come to counts no more, if they move.
    moved = anew(apart, held)
    if judge.keep_if_nearer(
        "Statistics of batch norms moved",
        lambda: move_batch_norms(student, reference, images),
        moved.student.outputs(first),
    ):
        seen, apart = anew(seen, images), moved
    if heads:
        judge.keep_if_nearer(
            "Linear layers solved anew",
            lambda: refit_heads(student, reference, images, (seen, apart), priors),
            apart.student.outputs(),
        )
    return judge
