"""Keep, rebuild or remove: one budget shared out between removing channels and rebuilding them.

Removing is the stronger the longer a network is trained afterwards, rebuilding the better start.
Which mixture is best for a network is tried out: each is made, trained for a moment, and compared.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sbf_dist.compress.budget import Budget
from sbf_dist.compress.calibration import BATCH, Calibration, device_of
from sbf_dist.compress.cost import count
from sbf_dist.compress.importance import Criterion
from sbf_dist.compress.plan import DenseLayer, Plan
from sbf_dist.compress.probe import Probe, divergence, train_briefly
from sbf_dist.compress.reconstruct import Progress, compress
from sbf_dist.compress.reference import Reference
from sbf_dist.compress.removal import Removable, find_removable, remove
from sbf_dist.errors import UserError

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
LARGEST_HELD_OUT = 512  # images on which candidates are compared


@dataclass
class Candidate:
    """A compressed network, and its KL divergence from the dense one on held-out images."""

    share: float
    student: nn.Module
    plan: Plan
    fitted: float
    trained: float | None = None

    @property
    def divergence(self) -> float:
        """Return the divergence by which candidates are compared."""
        return self.fitted if self.trained is None else self.trained


def plan_jointly(
    model: nn.Module,
    images: Tensor | Calibration,
    *,
    model_name: str,
    classes: int,
    budget: Budget,
    shares: Sequence[float] = SHARES,
    probe: Probe | None = None,
    keep_training: bool = False,
    held_out: float = 0.25,
    removal_criterion: Criterion = "fisher",
    removal_floor: float = 0.125,
    keep: tuple[str, ...] = (),
    round_to: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> tuple[nn.Module, Plan]:
    """Compress `model` to `budget` by the best mixture of removing and rebuilding channels.

    Each of `shares` is the part of the saving that removal makes: channels are removed up to it
    (`remove`), then `compress`, which `settings` are passed on to, meets the budget by SBF layers,
    fitted towards the outputs of `model`. Share 0 is rebuilding alone, share 1 pruning, so that by
    this measure the result is never worse than either. `images` (N, C, H, W) are normalised
    calibration images; the first `held_out` of them serve for the comparison alone. The
    candidate whose predictions, after `probe`, diverge least from the dense network's is returned
    with its plan, whose explanation has the table of all.

    The student is the fitted one, as the table gives it before the probe: the probe sees only
    calibration images, and the training that follows has a schedule of its own. `keep_training`
    returns it as the probe left it. Raises UserError if no candidate meets the budget.
    """
    ((unit, asked),) = budget.given().items()
    if unit not in ("macs", "params"):
        raise UserError(
            f"budget {unit} = {asked:g}: channels are removed to a budget of macs or params"
        )
    of: Literal["macs", "params"] = "macs" if unit == "macs" else "params"
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise UserError(f"removal shares {list(shares)} must be numbers in [0, 1]")
    probe = probe or Probe()
    held, rest = _split(Calibration.of(images, device=device_of(model)), held_out)
    dense = copy.deepcopy(model).eval()
    with torch.no_grad():
        held_targets = [(batch, dense(batch).log_softmax(1)) for batch in held.split(BATCH)]
    removable: Removable | None = None
    if any(shares):
        removable = find_removable(dense, rest, criterion=removal_criterion, keep=keep, seed=seed)

    def build(share: float) -> tuple[nn.Module, Plan]:
        return _build(
            removable if share else None,
            dense,
            rest,
            share=share,
            budget=budget,
            of=of,
            asked=asked,
            floor=removal_floor,
            round_to=round_to,
            model_name=model_name,
            classes=classes,
            seed=seed,
            settings=settings,
        )

    best: Candidate | None = None
    rows: list[str] = []
    refusal: UserError | None = None
    for index, share in enumerate(shares, 1):
        if progress is not None:
            progress("try shares of removal", index, len(shares))
        try:
            student, plan = build(share)
        except UserError as error:
            refusal = refusal or error
            rows.append(f"share {share:g} of the saving by removal: impossible, {error}")
            continue
        candidate = Candidate(share, student, plan, divergence(student, held_targets))
        trained = student
        if probe.steps:
            trained = train_briefly(dense, student, rest, probe, seed)
            candidate.trained = divergence(trained, held_targets)
        rows.append(_row(candidate, plan, of, probe))
        if best is None or candidate.divergence < best.divergence:
            best = candidate
            if keep_training:
                best.student = trained
    if best is None:
        assert refusal is not None
        raise refusal
    when = f"after {probe.steps} steps of distillation" if probe.steps else "as fitted"
    told = (
        f"{best.share:g} of the saving comes from removing channels, the rest from rebuilding: the "
        f"least KL divergence from the dense network {when}, on {len(held)} images held out"
    )
    explanation = [told, *rows, *best.plan.explanation]
    return best.student.eval(), best.plan.model_copy(update={"explanation": explanation})


def _row(candidate: Candidate, plan: Plan, of: str, probe: Probe) -> str:
    before = plan.macs_before if of == "macs" else plan.params_before
    after = plan.macs_after if of == "macs" else plan.params_after
    told = (
        f"share {candidate.share:g} of the saving by removal: {after / before:.4f} of the {of}, "
        f"KL {candidate.fitted:.5f} as fitted"
    )
    if candidate.trained is not None:
        told += f", {candidate.trained:.5f} after {probe.steps} steps"
    return told


def _build(
    removable: Removable | None,
    dense: nn.Module,
    images: Calibration,
    *,
    share: float,
    budget: Budget,
    of: Literal["macs", "params"],
    asked: float,
    floor: float,
    round_to: int,
    model_name: str,
    classes: int,
    seed: int,
    settings: dict[str, Any],
) -> tuple[nn.Module, Plan]:
    """Remove channels for `share` of the saving, rebuild for the rest."""
    names: dict[str, Any] = {"model_name": model_name, "classes": classes}
    if removable is None:
        return compress(dense, images, budget=budget, seed=seed, **names, **settings)
    cost = removable.cost
    removal = remove(
        removable, share=1 - share * (1 - asked), of=of, floor=floor, round_to=round_to
    )
    whole, left = (c.macs if of == "macs" else c.params for c in (cost, removal.cost))
    if left <= asked * whole * (1 + 1e-9):
        student = removal.network
        plan = _plan_without_rebuilding(student, images, names)
    else:
        reference = Reference(dense, removal.remaining(dense))
        rest = Budget(**{of: asked * whole / left})
        student, plan = compress(
            removal.network,
            images,
            budget=rest,
            reference=reference,
            seed=seed,
            **names,
            **settings,
        )
    return student, plan.model_copy(
        update={
            "budget": budget.given(),
            "macs_before": cost.macs,
            "params_before": cost.params,
            "removed": removal.removed,
        }
    )


def _plan_without_rebuilding(
    network: nn.Module, images: Calibration, names: dict[str, Any]
) -> Plan:
    cost = count(network, images.shape)
    layers = {
        name: DenseLayer(
            reason="the whole saving comes from removing channels",
            macs=cost.layers.get(name, 0),
            convertible=type(module) is nn.Conv2d and module.groups == 1,
        )
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    return Plan(
        model=names["model_name"],
        classes=names["classes"],
        input_shape=images.shape,
        budget={},
        macs_before=cost.macs,
        macs_after=cost.macs,
        params_before=cost.params,
        params_after=cost.params,
        layers=layers,
    )


class _Rest:
    """The images of a calibration without the first `skip`."""

    def __init__(self, images: Calibration, skip: int) -> None:
        self.images = images
        self.skip = skip

    def __iter__(self) -> Iterator[Tensor]:
        skip = self.skip
        for batch in self.images:
            if skip < len(batch):
                yield batch[skip:]
            skip = max(0, skip - len(batch))


def _split(images: Calibration, held_out: float) -> tuple[Tensor, Calibration]:
    held = min(LARGEST_HELD_OUT, round(held_out * images.count))
    if not 0 < held < images.count:
        raise UserError(
            f"held_out = {held_out:g} of {images.count} calibration images leaves none to "
            f"{'compare candidates' if held <= 0 else 'fit'} on"
        )
    return images.first(held), Calibration(_Rest(images, held), device=images.device)
