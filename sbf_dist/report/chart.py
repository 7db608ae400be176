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
