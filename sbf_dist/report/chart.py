"""The picture of a run: accuracy over cost."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def accuracy_over_macs(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw each row as a labelled point.

    A row has "name", "network" (those that begin with "sbf" have the accent colour), "top1" in
    [0, 1], and "macs".
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        sbf = row["network"].startswith("sbf")
        axes.scatter(row["macs"] / 1e6, 100 * row["top1"], s=60, color="C0" if sbf else "C7")
    _label(axes, rows)
    axes.set_xlabel("multiply-adds per image (M)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _label(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the names beside the points, apart from each other where points lie close."""
    low = min(100 * row["top1"] for row in rows)
    high = max(100 * row["top1"] for row in rows)
    gap = max(high - low, 1.0) / 22
    axes.set_ylim(low - 2 * gap, high + 3 * gap)
    widest = max(row["macs"] for row in rows) / 1e6
    placed: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: row["top1"]):
        x, y = row["macs"] / 1e6, 100 * row["top1"]
        while any(abs(x - px) < 0.35 * widest and abs(y - py) < gap for px, py in placed):
            y += gap / 4
        placed.append((x, y))
        right = x < 0.7 * widest
        axes.annotate(
            row["name"],
            (x, 100 * row["top1"]),
            xytext=(x + (0.015 if right else -0.015) * widest, y),
            ha="left" if right else "right",
            va="center",
            fontsize=9,
        )
