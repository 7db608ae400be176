"""Shrinking a network that has SBF layers already: in rounds, with training between."""

import torch
from torch import nn

from sbf_dist.budget import Budget
from sbf_dist.compression.calibration import Images
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.inputs import Packing, without_packing
from sbf_dist.compression.plan import Plan, SBFLayer
from sbf_dist.compression.precision import (
    with_types_of,
    without_autocast,
    working_copy,
    working_reference,
)
from sbf_dist.compression.prepared_images import calibration_for
from sbf_dist.compression.progress import Progress
from sbf_dist.compression.reconstruct import rebuild_more
from sbf_dist.compression.remembered import remember
from sbf_dist.errors import UserError
from sbf_dist.settings import Compression
from sbf_dist.surgery import deep_copy, unwrapped


def round_budgets(final: Budget, rounds: int, dense: float | None = None) -> list[Budget]:
    """Return the budgets of so many rounds, the last of which is `final`.

    The share that is taken away grows cubically, fast at first, when there is much that is not
    needed (Zhu and Gupta 2017, arXiv 1710.01878, equation 1): after round r of R the share left is
    1 - (1 - final) (1 - (1 - r / R)³). `dense` is the dense network's cost, needed where `final` is
    a number. Raises UserError for more than one round to a budget of time.
    """
    if rounds == 1:
        return [final]
    if final.unit == "ms":
        raise UserError(
            f"rounds = {rounds} needs a budget of macs or params, not {final.kind} = "
            f"{final.value:g}"
        )
    share = final.value
    if not final.is_share():
        assert dense is not None, "a budget that is a number is a share of the dense cost only"
        share = final.limit(dense) / dense
    left = [1 - (1 - share) * (1 - (1 - r / rounds) ** 3) for r in range(1, rounds)]
    return [*(Budget(**{final.kind: part}) for part in left), final]


@torch.no_grad()
@without_autocast()
def shrink(
    student: nn.Module,
    plan: Plan,
    images: Images,
    settings: Compression,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    reference: Reference | None = None,
) -> tuple[nn.Module, Plan]:
    """Compress `student` further, to a smaller budget; it belongs to `plan` and may be trained.

    The budget of `settings`, of multiply-adds or parameters, refers to the dense network, as in the
    first plan. SBF layers keep fewer filters: some kept channels become rebuilt ones, and all
    rebuilt channels are fitted to the new basis. Dense layers may become SBF layers; layers named
    by `keep` are not changed. No channels are removed, whatever `removal` says.

    images: as for `compress`. reference: a network with the same layers, to whose outputs layers
    are fitted; default: the student itself. progress: called with (what, done, total).

    Returns a network in eval mode and its plan, which refers to the dense network. Raises UserError
    if the budget cannot be met or is a latency, and for layers with something between basis and
    transformations.
    """
    budget = settings.budget
    if budget.unit == "ms":
        raise UserError(
            f"a network that has SBF layers cannot be shrunk to {budget.kind} = {budget.value:g}: "
            "give macs or params"
        )
    if settings.between is not None:
        raise UserError(
            f"between = {settings.between!r}: layers with it cannot be shrunk again; it must be "
            "None"
        )
    for name, layer in plan.layers.items():
        if isinstance(layer, SBFLayer) and layer.between is not None:
            raise UserError(
                f"layer {name} has {layer.between} between basis and transformations: it cannot be "
                "shrunk again"
            )
    network = working_copy(unwrapped(student))
    calibration = calibration_for(network, images)
    if reference is not None:
        reference = _prepared(reference, calibration.packing)
    smaller, new = rebuild_more(
        network,
        plan,
        calibration,
        settings,
        seed=seed,
        progress=progress,
        timing=None,
        reference=reference,
    )
    return remember(without_packing(with_types_of(student, smaller)), new), new


def _prepared(reference: Reference, packing: Packing | None) -> Reference:
    """Return `reference` without wrappers, in the type and with the inputs that are worked with."""
    reference = working_reference(Reference(unwrapped(reference.module), reference.channels))
    if packing is None:
        return reference
    return Reference(packing.install(deep_copy(reference.module)), reference.channels)
