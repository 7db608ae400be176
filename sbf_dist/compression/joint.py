"""Keep, rebuild or remove: one budget shared out between removing channels and rebuilding them.

Removing is the stronger the longer a network is trained afterwards, rebuilding the better start.
Which mixture is best for a network is tried out: each is made, trained for a moment, and compared.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sbf_dist.budget import COUNTS, ROUNDING, Budget
from sbf_dist.compression.calibration import BATCH, Calibration, calibration_for, dtype_of
from sbf_dist.compression.cost import count
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.plan import DenseLayer, Plan
from sbf_dist.compression.precision import working_copy
from sbf_dist.compression.progress import Progress, tell
from sbf_dist.compression.reconstruct import compress
from sbf_dist.compression.removal.importance import Criterion
from sbf_dist.compression.removal.probe import Probe, divergence, train_briefly
from sbf_dist.compression.removal.pruning import Measure, Removable, cost_of, find_removable, remove
from sbf_dist.errors import UserError

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
LARGEST_HELD_OUT = 512  # images on which candidates are compared


@dataclass(frozen=True)
class RemovalSettings:
    """How channels are removed: see find_removable and remove."""

    criterion: Criterion = "fisher"
    floor: float = 0.125
    keep: tuple[str, ...] = ()
    round_to: int = 1


@dataclass(frozen=True)
class Candidate:
    """A network compressed with one share, and its KL divergence from the dense network.

    student: as it was fitted; trained: after the probe, or the same; fitted_divergence,
    divergence: of the two on held-out images.
    """

    share: float
    student: nn.Module
    plan: Plan
    trained: nn.Module
    fitted_divergence: float
    divergence: float


class JointPlanner:
    """What the candidates for one network and budget have in common."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor | Calibration,
        *,
        model_name: str,
        classes: int,
        budget: Budget,
        removal: RemovalSettings | None = None,
        probe: Probe | None = None,
        held_out: float = 0.25,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if budget.kind not in COUNTS:
            raise UserError(
                f"budget {budget.kind} = {budget.value:g}: channels can be removed to a budget of "
                f"{' or '.join(COUNTS)} only"
            )
        self.of: Measure = "macs" if budget.kind == "macs" else "params"
        self.budget = budget
        self.removal = removal or RemovalSettings()
        self.probe = probe or Probe()
        self.seed = seed
        self.names: dict[str, Any] = {"model_name": model_name, "classes": classes}
        self.settings = dict(settings or {})
        self.dense = working_copy(model)
        calibration = calibration_for(self.dense, images)
        held, self.images = _split(calibration, held_out)
        self.cost = count(self.dense, self.images.shape, held)
        self.share = budget.limit(cost_of(self.cost, self.of)) / cost_of(self.cost, self.of)
        with torch.no_grad():
            self.held = [
                (x, self.dense(x).log_softmax(1)) for x in Calibration.of(held, batch=BATCH)
            ]

    def candidate(self, share: float) -> Candidate:
        """Make, and train for a moment, the network of which `share` of the saving is removal's.

        Raises UserError if it cannot meet the budget.
        """
        student, plan = self._build(share)
        fitted = divergence(student, self.held)
        if not self.probe.steps:
            return Candidate(share, student, plan, student, fitted, fitted)
        trained = train_briefly(self.dense, student, self.images, self.probe, self.seed)
        return Candidate(share, student, plan, trained, fitted, divergence(trained, self.held))

    @functools.cached_property
    def _removable(self) -> Removable:
        settings = self.removal
        return find_removable(
            self.dense,
            self.images,
            criterion=settings.criterion,
            keep=settings.keep,
            seed=self.seed,
        )

    def _build(self, share: float) -> tuple[nn.Module, Plan]:
        """Remove channels for `share` of the saving, rebuild for the rest."""
        common = {"seed": self.seed, **self.names, **self.settings}
        if share == 0:
            return compress(self.dense, self.images, budget=self.budget, **common)
        removal = remove(
            self._removable,
            share=1 - share * (1 - self.share),
            of=self.of,
            floor=self.removal.floor,
            round_to=self.removal.round_to,
            refit=self.settings.get("refit", True),
        )
        cost, criterion = self.cost, f"removal by {self.removal.criterion}"
        limit, left = self.share * cost_of(cost, self.of), cost_of(removal.cost, self.of)
        if left <= limit * (1 + ROUNDING):
            student = removal.network
            plan = _plan_without_rebuilding(student, self.images, self.names)
        else:
            student, plan = compress(
                removal.network,
                self.images,
                budget=Budget(**{self.of: limit / left}),
                reference=Reference(self.dense, removal.remaining(self.dense)),
                **common,
            )
            criterion = f"{criterion}, then {plan.criterion}"
        after = plan.macs_after if self.of == "macs" else plan.params_after
        self.budget.check(after, cost_of(cost, self.of))
        return student, plan.model_copy(
            update={
                "budget": self.budget.given(),
                "macs_before": cost.macs,
                "params_before": cost.params,
                "removed": removal.removed,
                "criterion": criterion,
            }
        )


def plan_jointly(
    model: nn.Module,
    images: Tensor | Calibration,
    *,
    model_name: str,
    classes: int,
    budget: Budget,
    shares: Sequence[float] = SHARES,
    removal: RemovalSettings | None = None,
    probe: Probe | None = None,
    keep_training: bool = False,
    held_out: float = 0.25,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> tuple[nn.Module, Plan]:
    """Compress `model` to `budget` by the best mixture of removing and rebuilding channels.

    Each of `shares` is the part of the saving that removal makes: channels are removed up to it,
    then `compress`, which `settings` are passed on to, meets the budget by SBF layers, fitted
    towards the outputs of `model`. Share 0 is rebuilding alone, share 1 pruning, so that by this
    measure the result is never worse than either. `images` (N, C, H, W) are normalised
    calibration images; the first `held_out` of them serve for the comparison alone. The candidate
    whose predictions, after `probe`, diverge least from the dense network's is returned with its
    plan, whose explanation has the table of all.

    The student is the fitted one, from before the probe: the probe sees only calibration images,
    and the training that follows has a schedule of its own. `keep_training` returns it as the
    probe left it. Raises UserError if no candidate meets the budget.
    """
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise UserError(f"removal: shares = {list(shares)} must be numbers in [0, 1]")
    planner = JointPlanner(
        model,
        images,
        model_name=model_name,
        classes=classes,
        budget=budget,
        removal=removal,
        probe=probe,
        held_out=held_out,
        seed=seed,
        settings=settings,
    )
    best: Candidate | None = None
    rows: list[str] = []
    refusals: list[UserError] = []
    for index, share in enumerate(shares, 1):
        tell(progress, "try shares of removal", index, len(shares))
        try:
            candidate = planner.candidate(share)
        except UserError as error:
            refusals.append(error)
            rows.append(f"share {share:g} by removal: impossible, {error}")
            continue
        rows.append(_row(candidate, planner.probe.steps))
        if best is None or candidate.divergence < best.divergence:
            best = candidate
    if best is None:
        raise refusals[0]
    steps = planner.probe.steps
    when = f"after {steps} steps of distillation" if steps else "as fitted"
    told = (
        f"share {best.share:g} of the saving comes from removing channels, the rest from "
        f"rebuilding: the least KL divergence from the dense network {when}, on images held out"
    )
    student = best.trained if keep_training else best.student
    after = "" if best.share == 0 else "Of what removal leaves: "
    explanation = [told, *rows, *(after + line for line in best.plan.explanation)]
    return student.to(dtype_of(model)), best.plan.model_copy(update={"explanation": explanation})


def _row(candidate: Candidate, steps: int) -> str:
    plan = candidate.plan
    told = (
        f"share {candidate.share:g} by removal: {plan.macs_after / plan.macs_before:.4f} of the "
        f"multiply-adds, {plan.params_after / plan.params_before:.4f} of the parameters, "
        f"KL {candidate.fitted_divergence:.5f} as fitted"
    )
    return f"{told}, {candidate.divergence:.5f} after {steps} steps" if steps else told


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
    return images.first(held), Calibration(
        _Rest(images, held), device=images.device, dtype=images.dtype
    )
