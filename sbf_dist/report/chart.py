"""The picture of a run: accuracy and cost of each network, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_HUES = (7, 2, 4, 1, 5, 6, 8, 9)  # of matplotlib's tab10; 0 is ours
_MARKERS = "sD^vP*X<"
_LINE_SPACING = 0.06  # of the height of a panel


def accuracy_and_cost(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw one line for each row: "name", "network", "top1" in [0, 1], "macs" per image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.8 + 0.4 * len(rows)), layout="constrained")
    accuracy, cost = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = range(len(rows))
    colors = ["C0" if row["network"].startswith("sbf") else "0.55" for row in rows]
    percent = [100 * row["top1"] for row in rows]
    millions = [row["macs"] / 1e6 for row in rows]
    accuracy.hlines(places, min(percent) - 2, percent, color=colors, alpha=0.35)
    accuracy.scatter(percent, places, s=50, color=colors, zorder=3)
    for place, value in zip(places, percent, strict=True):
        accuracy.annotate(
            f"{value:.1f}", (value, place), (6, 0), textcoords="offset points", va="center"
        )
    accuracy.set_yticks(places, [row["name"] for row in rows])
    accuracy.set_xlabel("top-1 accuracy (%)")
    accuracy.set_xlim(min(percent) - 2, max(percent) + 0.12 * (max(percent) - min(percent) + 4))
    accuracy.invert_yaxis()
    bars = cost.barh(places, millions, color=colors, height=0.6)
    cost.bar_label(bars, [f"{value:.1f}" for value in millions], padding=4)
    cost.set_xlabel("multiply-adds per image (M)")
    cost.set_xlim(0, 1.15 * max(millions))
    for axes in (accuracy, cost):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
    return figure


def accuracy_over_macs(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw the rows of a comparison: a panel for each length of training, a line for each method.

    A row has "method", "title", "reached" (share of the dense network's multiply-adds),
    "trained_steps", "top1_mean" and "top1_std" in [0, 1]; those with "refused" are left out. The
    method "dense" is a horizontal line, "sbf" has the colour.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if not row.get("refused")]
    lengths = sorted({row["trained_steps"] for row in rows})
    methods = list(dict.fromkeys(r["method"] for r in rows if r["method"] != "dense"))
    figure = Figure(figsize=(0.6 + 4.4 * len(lengths), 4.6), layout="constrained")
    panels = figure.subplots(1, len(lengths), squeeze=False)[0]
    for axes, steps in zip(panels, lengths, strict=True):
        here = [row for row in rows if row["trained_steps"] == steps]
        _draw_panel(axes, here, methods)
        axes.set_title("not trained" if steps == 0 else f"trained for {steps} steps", loc="left")
    panels[0].set_ylabel("top-1 accuracy (%)")
    figure.supxlabel("multiply-adds (% of the dense network)", fontsize="medium")
    return figure


@dataclass(frozen=True)
class _Line:
    """A method in one panel: costs (empty for the dense network) and accuracies, in percent."""

    title: str
    color: Any
    costs: list[float]
    top1: list[float]
    deviations: list[float]


def _draw_panel(axes: Any, rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> None:
    lines = _lines(rows, methods)
    for number, line in enumerate(lines):
        ours = line.title == "SBF"
        if line.costs:
            axes.errorbar(
                line.costs,
                line.top1,
                line.deviations,
                color=line.color,
                marker="o" if ours else _MARKERS[number % len(_MARKERS)],
                markersize=7 if ours else 5,
                linewidth=2.6 if ours else 1.3,
                elinewidth=0.9,
                capsize=2.5,
                zorder=4 if ours else 3,
            )
    _set_limits(axes, lines)
    left, end = axes.get_xlim()[0], _cheapest(lines)
    for line in lines:
        if not line.costs:
            level, deviation = line.top1[0], line.deviations[0]
            axes.plot(
                [left, end], [level] * 2, color=line.color, dashes=(4, 3), linewidth=1, zorder=2
            )
            axes.fill_between(
                [left, end], level - deviation, level + deviation, color="0.93", linewidth=0
            )
    _label_ends(axes, lines)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _lines(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[_Line]:
    import matplotlib

    hue = matplotlib.colormaps["tab10"]
    others = [method for method in methods if method != "sbf"]
    colors = {method: hue(_HUES[n % len(_HUES)]) for n, method in enumerate(others)}
    found = []
    for method in [*methods, "dense"]:
        mine = sorted((r for r in rows if r["method"] == method), key=lambda r: -r["reached"])
        if mine:
            found.append(
                _Line(
                    title=mine[0]["title"],
                    color={"sbf": hue(0), "dense": "0.25"}.get(method) or colors[method],
                    costs=[100 * row["reached"] for row in mine] if method != "dense" else [],
                    top1=[100 * row["top1_mean"] for row in mine],
                    deviations=[100 * row["top1_std"] for row in mine],
                )
            )
    return found


def _cheapest(lines: Sequence[_Line]) -> float:
    return min((cost for line in lines for cost in line.costs), default=95.0)


def _set_limits(axes: Any, lines: Sequence[_Line]) -> None:
    """Make room for error bars, and on the right for the names."""
    costs = [cost for line in lines for cost in line.costs]
    most, least = max(costs, default=100.0), _cheapest(lines)
    width = max(most - least, 5.0)
    axes.set_xlim(most + 0.06 * width, least - 0.85 * width)  # costs fall from left to right
    axes.set_xticks(sorted({round(cost) for cost in costs}))
    pairs = [pair for line in lines for pair in zip(line.top1, line.deviations, strict=True)]
    bottom = max(0.0, min(value - deviation for value, deviation in pairs))
    top = min(100.0, max(value + deviation for value, deviation in pairs))
    height = max(top - bottom, 2.0)
    axes.set_ylim(bottom - 0.06 * height, top + 0.06 * height)


def _label_ends(axes: Any, lines: Sequence[_Line]) -> None:
    """Name each line beside its cheapest end, on the right; the names are moved apart."""
    (bottom, top), (left, right) = axes.get_ylim(), axes.get_xlim()
    order = sorted(lines, key=lambda line: line.top1[-1])
    gap = _LINE_SPACING * (top - bottom)
    least, most = bottom + gap / 2, top - gap / 2
    places = _spread([line.top1[-1] for line in order], gap, least)
    if places[-1] > most:  # the block at the top is pushed down as one
        places = [-y for y in reversed(_spread([-y for y in reversed(places)], gap, -most))]
    for line, place in zip(order, places, strict=True):
        end = line.costs[-1] if line.costs else _cheapest(lines)
        title = line.title if line.costs else f"{line.title}, {line.top1[-1]:.1f}"
        axes.annotate(
            title,
            (end, line.top1[-1]),
            (_cheapest(lines) - 0.08 * (left - right), place),
            color=line.color,
            fontsize=9,
            fontweight="bold" if line.title == "SBF" else "normal",
            va="center",
            arrowprops={"arrowstyle": "-", "color": line.color, "linewidth": 0.6, "alpha": 0.6},
        )


def _spread(values: Sequence[float], gap: float, least: float) -> list[float]:
    """Move ascending values apart to `gap` at least, none below `least`, as little as possible."""
    blocks: list[tuple[float, int]] = []  # values that touch: where the first stands, how many
    for value in values:
        start, size = max(value, least), 1
        while blocks and blocks[-1][0] + blocks[-1][1] * gap > start:
            before, count = blocks.pop()
            # The mean of where the members would stand alone, given their places in the block.
            start = (before * count + (start - count * gap) * size) / (count + size)
            start, size = max(start, least), count + size
        blocks.append((start, size))
    return [start + gap * number for start, size in blocks for number in range(size)]
