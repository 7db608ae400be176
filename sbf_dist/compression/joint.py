"""Keep, rebuild or remove: one budget shared between removing and rebuilding channels.

Removing is the stronger the longer a network is trained afterwards, rebuilding the better start.
Which shares are best for a network is tried out: each is built, trained briefly, and compared.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from sbf_dist.budget import COUNTS, ROUNDING, Budget
from sbf_dist.compression.calibration import Images
from sbf_dist.compression.cost import count
from sbf_dist.compression.dense_plan import architecture_of, dense_plan
from sbf_dist.compression.fitting.fidelity import OutputsFor, Wanted
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.holding_out import not_judged, split
from sbf_dist.compression.inputs import without_packing
from sbf_dist.compression.outputs import Yardstick
from sbf_dist.compression.plan import Layer, Plan
from sbf_dist.compression.precision import with_types_of, without_autocast, working_copy
from sbf_dist.compression.prepared_images import calibration_for
from sbf_dist.compression.progress import Progress, report
from sbf_dist.compression.reconstruct import rebuild
from sbf_dist.compression.remembered import remember
from sbf_dist.compression.removal.probe import Probe, train_briefly
from sbf_dist.compression.removal.pruning import (
    Criterion,
    Removable,
    find_removable,
    finish,
    remove,
)
from sbf_dist.compression.removal.widths import Measure, cost_of
from sbf_dist.errors import UserError
from sbf_dist.models import Architecture
from sbf_dist.settings import Compression
from sbf_dist.surgery import in_eval_mode, unwrapped

SHARES = (0.0, 0.5, 1.0)
REMOVED_ONLY = "the whole saving comes from removing channels"


@dataclass(frozen=True)
class Candidate:
    """A network compressed with one share, and its divergence from the dense network.

    student: as it was fitted; trained: after the probe, or the same; fitted_divergence,
    divergence: of the two, on held-out images if there are any.
    """

    share: float
    student: nn.Module
    plan: Plan
    trained: nn.Module
    fitted_divergence: float
    divergence: float


class JointPlanner:
    """What the candidates for one network and budget have in common.

    images: as for `compress`; candidates are compared on those that fitting holds out
    (`holding_out`). probe: how candidates are trained before that; None takes `probe_steps` of the
    settings where `removal` is 'auto', and compares them as fitted elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        settings: Compression,
        *,
        probe: Probe | None = None,
        name: str | Architecture | None = None,
        seed: int = 0,
    ) -> None:
        budget = settings.budget
        if budget.kind not in COUNTS:
            raise UserError(
                f"budget {budget.kind} = {budget.value:g}: channels can be removed to a budget of "
                f"{' or '.join(COUNTS)} only"
            )
        self.settings = settings
        self.of: Measure = "macs" if budget.kind == "macs" else "params"
        steps = settings.probe_steps if settings.removal == "auto" else 0
        self.probe = probe or Probe(steps=steps)
        self.seed = seed
        self.dense = working_copy(model)
        self.images = calibration_for(self.dense, images)
        self.fitted, self.held = split(self.images)
        self.yardstick = Yardstick.of(self.dense, self.images, settings)
        self.wanted = Wanted.of(self.dense, self.held or self.images, self.yardstick)
        examples = self.images.first(2)
        # Of the network itself: what is narrowed is not recognised.
        self.name = architecture_of(self.dense, examples, name, settings)
        self.cost = count(self.dense, self.images.shape, examples)
        self.share = budget.limit(cost_of(self.cost, self.of)) / cost_of(self.cost, self.of)

    def candidate(self, share: float) -> Candidate:
        """Build, and train briefly, the network of which `share` of the saving is removal's.

        Raises UserError if it cannot meet the budget.
        """
        student, plan = self._build(share)
        fitted = self._divergence(student)
        if not self.probe.steps:
            return Candidate(share, student, plan, student, fitted, fitted)
        trained = train_briefly(
            self.dense, student, self.fitted, self.probe, self.seed, self.yardstick
        )
        return Candidate(share, student, plan, trained, fitted, self._divergence(trained))

    def best(
        self,
        shares: Sequence[float],
        *,
        keep_training: bool = False,
        progress: Progress | None = None,
    ) -> tuple[nn.Module, Plan]:
        """Return the candidate that diverges least, and its plan: see `plan_jointly`."""
        if not shares or not all(0 <= share <= 1 for share in shares):
            raise UserError(f"removal: shares = {list(shares)} must be numbers in [0, 1]")
        if len(shares) > 1 and self.held is None:
            raise UserError(
                f"removal = {self.settings.removal!r}: of {self.images.count} calibration images "
                "none can be held out to compare shares on; give 8 or more, of two sources or more"
            )
        best: Candidate | None = None
        rows: list[str] = []
        refusals: list[UserError] = []
        for index, share in enumerate(shares, 1):
            report(progress, "try shares of removal", index, len(shares))
            try:
                candidate = self.candidate(share)
            except UserError as error:
                refusals.append(error)
                rows.append(f"share {share:g} by removal: impossible, {error}")
                continue
            rows.append(_row(candidate, self.probe.steps, self.yardstick.title))
            if best is None or candidate.divergence < best.divergence:
                best = candidate
        if best is None:
            raise refusals[0]
        steps = self.probe.steps
        when = f"after {steps} steps of distillation" if steps else "as fitted"
        choice = (
            f"share {best.share:g} of the saving comes from removing channels, the rest from "
            "rebuilding"
        )
        if len(shares) > 1:
            choice += f": the least divergence from the dense network {when}, on images held out"
        student = best.trained if keep_training else best.student
        after = "" if best.share == 0 else "After removal: "
        explanation = [choice, *rows, *(after + line for line in best.plan.explanation)]
        return student, best.plan.model_copy(update={"explanation": explanation})

    def _divergence(self, student: nn.Module) -> float:
        """Measure on the images held out, or on all where none are, in evaluation mode."""
        outputs = OutputsFor(in_eval_mode(student), self.held or self.images)
        return self.wanted.compare(outputs).divergence

    @functools.cached_property
    def _removable(self) -> Removable:
        keep = tuple(self.settings.keep)
        return find_removable(
            self.dense,
            self.images,
            criterion=self._criterion,
            keep=keep,
            seed=self.seed,
            yardstick=self.yardstick,
        )

    @property
    def _criterion(self) -> Criterion:
        """By what channels are removed: what is solved anew afterwards makes up for some."""
        return "reconstruction" if self.settings.refit else "fisher"

    def _build(self, share: float) -> tuple[nn.Module, Plan]:
        """Remove channels for `share` of the saving, rebuild for the rest."""
        settings = self.settings
        if share == 0:
            return rebuild(self.dense, self.images, settings, name=self.name, seed=self.seed)
        removal = remove(self._removable, settings, 1 - share * (1 - self.share))
        cost, criterion = self.cost, f"removal by {self._criterion}"
        limit, left = self.share * cost_of(cost, self.of), cost_of(removal.cost, self.of)
        if left <= limit * (1 + ROUNDING):
            student = removal.network
            judge = finish(removal, self._removable, settings) if removal.removed else None
            plan = self._plan_without_rebuilding(student)
            if judge is not None:
                reached = {"explanation": judge.steps, "fidelity": judge.record()}
                plan = plan.model_copy(update=reached)
            elif removal.removed:
                plan = plan.model_copy(update={"explanation": [not_judged(self.images)]})
        else:
            removal = removal.without_fit()
            student, plan = rebuild(
                removal.network,
                self.images,
                settings.with_budget(Budget(**{self.of: limit / left})),
                name=self.name,
                seed=self.seed,
                reference=Reference(self.dense, removal.remaining(self.dense)),
            )
            criterion = f"{criterion}, then {plan.criterion}"
        after = plan.macs_after if self.of == "macs" else plan.params_after
        settings.budget.check(after, cost_of(cost, self.of))
        return student, plan.model_copy(
            update={
                "budget": settings.budget.given(),
                "macs_before": cost.macs,
                "params_before": cost.params,
                "removed": removal.removed,
                "criterion": criterion,
            }
        )

    def _plan_without_rebuilding(self, network: nn.Module) -> Plan:
        plan = dense_plan(network, self.images, self.name, self.settings)
        layers: dict[str, Layer] = {}
        for name, layer in plan.layers.items():
            conv = network.get_submodule(name)
            plain = type(conv) is nn.Conv2d and conv.groups == 1
            update = {"reason": REMOVED_ONLY, "convertible": plain}
            layers[name] = layer.model_copy(update=update)
        return plan.model_copy(update={"layers": layers})


@without_autocast()
def plan_jointly(
    model: nn.Module,
    images: Images,
    settings: Compression,
    *,
    probe: Probe | None = None,
    keep_training: bool = False,
    name: str | Architecture | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[nn.Module, Plan]:
    """Compress `model` by the best combination of removing and rebuilding channels.

    `removal` of the settings is the share of the saving that removal has: channels are removed up
    to it, then SBF layers, fitted towards the outputs of `model`, meet the budget. Share 0 is
    rebuilding alone, share 1 pruning. 'auto' tries SHARES, so that by this measure the result is
    never worse than either: the candidate whose predictions, after `probe`, diverge least from the
    dense network's is returned with its plan, whose explanation has the table of all. See
    `JointPlanner` for images and probe, and `compress` for the other arguments.

    The student is the fitted one, from before the probe: the probe sees only calibration images,
    and the training that follows has a schedule of its own. `keep_training` returns it as the
    probe left it. Raises UserError if no candidate meets the budget, or if it is one of time.
    """
    model = unwrapped(model)
    planner = JointPlanner(model, images, settings, probe=probe, name=name, seed=seed)
    shares = SHARES if settings.removal == "auto" else (settings.removal,)
    student, plan = planner.best(shares, keep_training=keep_training, progress=progress)
    return remember(without_packing(with_types_of(model, student)), plan), plan


def _row(candidate: Candidate, steps: int, title: str) -> str:
    plan = candidate.plan
    row = (
        f"share {candidate.share:g} by removal: {plan.macs_after / plan.macs_before:.4f} of the "
        f"multiply-adds, {plan.params_after / plan.params_before:.4f} of the parameters, "
        f"{title} {candidate.fitted_divergence:.5f} as fitted"
    )
    return f"{row}, {candidate.divergence:.5f} after {steps} steps" if steps else row
