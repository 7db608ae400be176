"""The reasons in a plan: cost and loss of each layer, and how the budget was shared out.

Losses are estimates of the divergence from the outputs before (of logits in nats per image, of
others as a share of their variance), plus a term for layers that keep a small number of dimensions
(`options.Estimated.scaled`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sbf_dist.budget import Budget
from sbf_dist.compression.planning.knapsack import Option, frontier
from sbf_dist.compression.planning.options import Search

NAMED = 4  # layers that a sentence names
LEFT_ALONE = "shrinking other layers costs less"
# What costs are written in, by unit: the size of a step, and its name.
STEPS = {"multiply-adds": (1e6, "M multiply-adds"), "parameters": (1e3, "k parameters")}


@dataclass(frozen=True)
class Spending:
    """How a budget was shared out among layers; costs are in the budget's unit.

    search: what was tried, and within which budget; options: what each layer could have been, the
    layer as it is first; chosen: what it became; channels: its output channels; criteria: the
    criterion that ranked them; before, after: the whole network's cost; dense: that of the dense
    network, of which a share is meant.
    """

    search: Search
    options: Mapping[str, list[Option]]
    chosen: Mapping[str, Option]
    channels: Mapping[str, int]
    criteria: Mapping[str, str]
    dense: float
    before: float
    after: float

    @property
    def budget(self) -> Budget:
        """The budget that was shared out."""
        return self.search.settings.budget

    def is_changed(self, name: str) -> bool:
        """Whether a layer became something else than it was."""
        return self.chosen[name] != self.options[name][0]

    def reason(self, name: str) -> str:
        """Say what became of one layer and why: its share, its loss, and the next steps."""
        option, row = self.chosen[name], self.options[name]
        parts = []
        if self.is_changed(name):
            parts.append(
                f"{option.kept} of {self.channels[name]} filters kept by {self.criteria[name]}, "
                f"{_wiring(option)}"
            )
        elif len(row) == 1 and not self.search.kept(row[0].kept):
            parts.append(f"its {row[0].kept} filters are no more than floor and round_to keep")
        elif len(row) == 1:
            fewer = "was measured faster" if self.budget.unit == "ms" else "costs less"
            parts.append(f"no SBF form of it {fewer}")
        else:
            parts.append(LEFT_ALONE)
        size, unit = self._scale()
        parts.append(
            f"{row[0].cost / size:.4g} -> {option.cost / size:.4g} {unit}, "
            f"{_share(row[0].cost, self.before)} of the network's before and "
            f"{_share(option.cost, self.after)} after"
        )
        if self.is_changed(name):
            parts.append(f"adds about {option.loss:.2g} to the loss")
        cheaper, dearer = neighbours(row, option)
        if cheaper is not None:
            parts.append(f"one step cheaper, {self._step(option, cheaper)}")
        if dearer is not None:
            parts.append(f"one step more expensive, {self._step(option, dearer)}")
        return "; ".join(parts)

    def explain(self, protected: Mapping[str, str]) -> list[str]:
        """Say in sentences how the budget was shared out.

        `protected` gives the reason of each layer that had no options at all.
        """
        size, unit = self._scale()
        value = self.budget.value
        sentences = [
            f"Budget: {self.budget.kind} = {value:.10g}, "
            f"{min(value, 1) * self.dense / size if self.budget.is_share() else value / size:.4g} "
            f"of the dense network's {self.dense / size:.4g} {unit}; "
            f"reached: {self.after / size:.4g}, {_share(self.after, self.dense)}.",
            f"Criterion: {self._criterion()}.",
        ]
        changed = {name: o for name, o in self.chosen.items() if self.is_changed(name)}
        if changed:
            loss = sum(option.loss for option in changed.values())
            dear = sorted(changed, key=lambda name: -changed[name].loss)
            sentences.append(
                f"Estimated to add {loss:.2g} to the loss before training, most in "
                f"{_listed(f'{name} ({changed[name].loss:.2g})' for name in dear)}."
            )
            saved = {name: self.options[name][0].cost - o.cost for name, o in changed.items()}
            large = sorted(saved, key=lambda name: -saved[name])
            sentences.append(
                f"Saved {(self.before - self.after) / size:.4g} {unit}, most in "
                f"{_listed(f'{n} ({_share(saved[n], sum(saved.values()))})' for n in large)}."
            )
        sentences += self._prices(size, unit)
        floors = [name for name, option in changed.items() if self._is_at_floor(name, option)]
        if floors:
            sentences.append(f"At the minimum of floor and round_to: {_listed(floors)}.")
        reasons = dict(protected) | {
            name: self.reason(name).partition(";")[0]
            for name in self.chosen
            if not self.is_changed(name)
        }
        for reason in dict.fromkeys(reasons.values()):
            names = [name for name, its_reason in reasons.items() if its_reason == reason]
            sentences.append(f"Unchanged ({reason}): {_listed(names)}.")
        return sentences

    def _prices(self, size: float, unit: str) -> list[str]:
        """Say where a little more budget would do most, and where a little less costs least."""
        gains, costs = {}, {}
        for name, option in self.chosen.items():
            cheaper, dearer = neighbours(self.options[name], option)
            if cheaper is not None:
                saved = (option.cost - cheaper.cost) / size
                costs[name] = (cheaper.loss - option.loss) / saved
            if dearer is not None:
                gains[name] = (option.loss - dearer.loss) / ((dearer.cost - option.cost) / size)
        sentences = []
        if gains:
            best = max(gains, key=gains.__getitem__)
            sentences.append(
                f"More budget would help most in {best}: {gains[best]:.2g} less loss per {unit}."
            )
        if costs:
            best = min(costs, key=costs.__getitem__)
            sentences.append(
                f"Less budget would cost least in {best}: {costs[best]:.2g} more loss per {unit}."
            )
        return sentences

    def _is_at_floor(self, name: str, option: Option) -> bool:
        return option.kept == min(o.kept for o in self.options[name])

    def _criterion(self) -> str:
        """Name the criteria that were used, the most frequent first, and how often."""
        used = list(self.criteria.values())
        ranked = sorted(dict.fromkeys(used), key=lambda criterion: -used.count(criterion))
        if len(ranked) <= 1:
            return ranked[0] if ranked else "not used"
        counts = {criterion: used.count(criterion) for criterion in ranked}
        return ", ".join(f"{c} in {n} layer{'s' if n > 1 else ''}" for c, n in counts.items())

    def _scale(self) -> tuple[float, str]:
        return STEPS.get(self.budget.unit, (1.0, self.budget.unit))

    def _step(self, here: Option, there: Option) -> str:
        size, unit = self._scale()
        cost, loss = (there.cost - here.cost) / size, there.loss - here.loss
        form = f"{there.kept} kept, {_wiring(there)}" if there.sources else "dense"
        per = f"{loss / cost:.2g} per {unit}"
        return f"{form}: {cost:+.3g} {unit}, {loss:+.2g} loss, {per}"


def neighbours(row: list[Option], option: Option) -> tuple[Option | None, Option | None]:
    """Return the next cheaper and the next dearer of a layer's options that are worth their cost.

    They are corners of the lower convex hull of loss over cost: between them more cost buys less
    and less, and what one share of the budget buys can be compared between layers.
    """
    hull: list[Option] = []
    for new in frontier(row):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], new):
            hull.pop()
        hull.append(new)
    cheaper = [o for o in hull if o.cost < option.cost and o.loss > option.loss]
    dearer = [o for o in hull if o.cost > option.cost and o.loss < option.loss]
    return (cheaper[-1] if cheaper else None), (dearer[0] if dearer else None)


def _slope(cheap: Option, dear: Option) -> float:
    return (dear.loss - cheap.loss) / (dear.cost - cheap.cost)


def _wiring(option: Option) -> str:
    if option.whole_basis:
        return "the others rebuilt from the whole basis (m = 1)"
    sources = "1 source" if option.sources == 1 else f"{option.sources} sources"
    return f"{sources}, m = {option.size}"


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = len(every) - NAMED
    named = ", ".join(every[:NAMED])
    return f"{named} and {more} more" if more > 0 else named


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3g} %" if whole > 0 else "nothing"
