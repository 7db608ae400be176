"""Compression in one call: from a network and images to a student and its plan."""

from typing import Unpack

from torch import nn

from sbf_dist.budget import Budget, BudgetKeywords
from sbf_dist.compression.calibration import Calibration, Images, device_of, dtype_of
from sbf_dist.compression.inputs import number_of_inputs, without_packing
from sbf_dist.compression.joint import plan_jointly
from sbf_dist.compression.likeness import warn_of_unlike
from sbf_dist.compression.plan import Plan
from sbf_dist.compression.planning.latency_table import Timing
from sbf_dist.compression.precision import without_autocast
from sbf_dist.compression.progress import Progress
from sbf_dist.compression.reconstruct import rebuild
from sbf_dist.compression.remembered import remember
from sbf_dist.models import Architecture
from sbf_dist.settings import Compression
from sbf_dist.surgery import unwrapped


@without_autocast()
def compress(
    model: nn.Module,
    images: Images,
    settings: Compression | None = None,
    *,
    name: str | Architecture | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    timing: Timing | None = None,
    **budget: Unpack[BudgetKeywords],
) -> tuple[nn.Module, Plan]:
    """Compress a trained network within a budget, without labels and without training.

    model: any network with convolutions; it is not changed. The work is done on its device.
        Wrappers (DataParallel, torch.compile, …) are removed: names are those of the network
        inside.
    images: a few hundred normalised calibration images: a tensor (N, C, H, W), a DataLoader of
        images or of (image, label), or any iterable that can be iterated again and yields the same
        batches. A network with several inputs takes the first tensors of each batch.
    settings: what is kept, rebuilt and removed; default: Compression's defaults.
    name: of the network, as `sbf_dist.models.build` takes it, or a `models.Architecture` with its
        arguments; default: detected.
    seed: random seed.
    progress: called with (what, done, total).
    timing: how times are measured, for a latency budget.
    budget: macs, params, latency or latency_ms, see Budget; overrides that of `settings`.

    Returns the student in eval mode and its plan. Raises UserError if the budget cannot be met, a
    weight is not finite, nothing can be converted, or the network already has SBF layers. Warns
    (UserWarning) about images that do not match the network's batch norm statistics.
    """
    model = unwrapped(model)
    if settings is None:
        settings = Compression(**budget)
    elif budget:
        settings = settings.with_budget(Budget(**budget))
    if number_of_inputs(model) == 1:
        images = Calibration.of(images, device=device_of(model), dtype=dtype_of(model))
        warn_of_unlike(model, images)
    if settings.removal == 0:
        student, plan = rebuild(
            model, images, settings, name=name, seed=seed, progress=progress, timing=timing
        )
    else:
        student, plan = plan_jointly(
            model, images, settings, name=name, seed=seed, progress=progress
        )
    return remember(without_packing(student), plan), plan
