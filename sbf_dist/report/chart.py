"""The picture of a run: accuracy and cost of each network, side by side."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def _draw_panel(axes: Any, rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> None:
    import matplotlib

    lines: list[tuple[str, str, list[float], list[float]]] = []
    hues = [matplotlib.colormaps["tab10"](index) for index in (7, 2, 4, 1, 5, 6, 8, 9)]
    others = [method for method in methods if method != "sbf"]
    markers = "osD^vP*X"
    for method in methods:
        mine = sorted((r for r in rows if r["method"] == method), key=lambda r: -r["reached"])
        if not mine:
            continue
        ours = method == "sbf"
        place = 0 if ours else others.index(method)
        color = matplotlib.colormaps["tab10"](0) if ours else hues[place % len(hues)]
        xs = [100 * row["reached"] for row in mine]
        ys = [100 * row["top1_mean"] for row in mine]
        axes.errorbar(
            xs,
            ys,
            [100 * row["top1_std"] for row in mine],
            color=color,
            marker="o" if ours else markers[(place + 1) % len(markers)],
            markersize=7 if ours else 5,
            linewidth=2.6 if ours else 1.3,
            elinewidth=1,
            capsize=2.5,
            zorder=4 if ours else 3,
        )
        lines.append((mine[0]["title"], color, xs, ys))
    dense = [row for row in rows if row["method"] == "dense"]
    for row in dense:
        level = 100 * row["top1_mean"]
        axes.axhline(level, color="0.2", linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        spread = 100 * row["top1_std"]
        axes.axhspan(level - spread, level + spread, color="0.2", alpha=0.08, linewidth=0)
        lines.append((f"dense, {level:.1f}", "0.2", [], [level]))
    _label_ends(axes, lines)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def _label_ends(
    axes: Any, lines: Sequence[tuple[str, Any, Sequence[float], Sequence[float]]]
) -> None:
    """Name each line beside its cheapest end, on the right; labels are moved apart."""
    ends = [x for _, _, xs, _ in lines for x in xs]
    levels = [y for _, _, _, ys in lines for y in ys]
    most, least = max(ends, default=100.0), min(ends, default=100.0)
    width = max(most - least, 5.0)
    bottom, top = min(levels), max(levels)
    height = max(top - bottom, 2.0)
    axes.set_ylim(bottom - 0.08 * height, top + 0.08 * height)
    axes.set_xlim(most + 0.06 * width, least - 0.85 * width)  # costs fall from left to right
    axes.set_xticks(sorted({round(x) for x in ends}))
    gap = 0.062 * 1.16 * height
    order = sorted(lines, key=lambda line: line[3][-1])
    places = _spread([line[3][-1] for line in order], gap, bottom - 0.05 * height)
    overflow = max(0.0, places[-1] - (top + 0.05 * height)) if places else 0.0
    if overflow:
        flipped = _spread([-y for y in reversed([p for p in places])], gap, -(top + 0.05 * height))
        places = [-y for y in reversed(flipped)]
    for (title, color, xs, ys), place in zip(order, places, strict=True):
        end = (xs[-1] if xs else least - 0.02 * width, ys[-1])
        bold = "bold" if title == "SBF" else "normal"
        axes.annotate(
            title,
            end,
            (least - 0.16 * width, place),
            color=color,
            fontsize=8.5,
            fontweight=bold,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6},
        )


def _spread(values: Sequence[float], gap: float, least: float) -> list[float]:
    """Move ascending values apart to `gap` at least, none below `least`; blocks stay centred."""
    blocks: list[tuple[float, int]] = []  # sum of (value - offset), number of members
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 or blocks[0][0] / blocks[0][1] < least:
            total, size = blocks[-1]
            if len(blocks) == 1:
                blocks[0] = (least * size, size)
                break
            before, count = blocks[-2]
            if total / size >= before / count + gap * count:
                break
            blocks[-2:] = [(before + total - gap * count * size, count + size)]
    return [
        max(total / size, least) + gap * number for total, size in blocks for number in range(size)
    ]
