"""The picture of pseudo-labels: classes, confidence, reliability and agreement."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sbf_dist.report.labels import BINS, USED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_BARS = 24  # classes that have a bar with a name each
_MAX_NAME = 16  # characters
_COLORS = {"unlabelled": "0.6", USED: "C0", "labelled": "C2", "validation": "C1"}


def draw_labels(report: Mapping[str, Any]) -> "Figure":
    """Draw the figures that labels.describe gives, in four panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (classes, confidence), (reliability, agreement) = figure.subplots(2, 2)
    _draw_classes(classes, report)
    _draw_confidence(confidence, report)
    _draw_reliability(reliability, report)
    _draw_agreement(agreement, report)
    for axes in (classes, confidence, reliability, agreement):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_classes(axes: Any, report: Mapping[str, Any]) -> None:
    counts = {name: np.array(values) for name, values in report["per_class"].items()}
    order = np.argsort(-counts["predicted"], kind="stable")
    places = np.arange(len(order))
    few = len(order) <= _MAX_BARS
    for name, values in counts.items():
        color = _COLORS[USED] if name == USED else "0.8"
        if few:
            axes.bar(places, values[order], color=color, width=0.8, label=name)
        else:
            axes.fill_between(places, values[order], step="mid", color=color, label=name)
    if few:
        names = [_shortened(report["classes"][c]) for c in order]
        axes.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor")
    else:
        axes.set_xlabel(f"{len(order)} classes, by the number predicted")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("images")
    axes.set_title("images of each predicted class", loc="left")
    if len(counts) > 1:
        axes.legend(frameon=False)


def _draw_confidence(axes: Any, report: Mapping[str, Any]) -> None:
    edges = np.linspace(0, 1, BINS + 1)
    for name, counts in report["confidence"].items():
        shares = np.array(counts) / sum(counts)
        axes.stairs(100 * shares, edges, color=_color(name), linewidth=1.8, label=name)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("confidence of the ensemble")
    axes.set_ylabel("images (%)")
    axes.set_title("confidence", loc="left")
    axes.legend(frameon=False, loc="upper left")


def _draw_reliability(axes: Any, report: Mapping[str, Any]) -> None:
    axes.plot([0, 1], [0, 100], color="0.8", linewidth=1, zorder=1)
    errors = {row["part"]: row["ece"] for row in report["parts"]}
    for name, bins in report["reliability"].items():
        if name == USED:  # which are among those without labels
            continue
        shares = np.array([one["images"] for one in bins]) / sum(one["images"] for one in bins)
        at = [one["confidence"] for one in bins]
        right = [100 * one["accuracy"] for one in bins]
        color = _color(name)
        axes.plot(
            at, right, color=color, linewidth=1.4, label=f"{name}, ECE {100 * errors[name]:.1f} %"
        )
        axes.scatter(at, right, s=8 + 160 * shares, color=color, zorder=3, linewidths=0)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 103)
    axes.set_xlabel("confidence of the ensemble (points: larger for more images)")
    axes.set_ylabel("right (%)")
    axes.set_title("reliability", loc="left")
    if report["reliability"]:
        axes.legend(frameon=False, loc="lower right")
    else:
        axes.text(0.5, 50, "no image has a known class", ha="center", color="0.4")


def _draw_agreement(axes: Any, report: Mapping[str, Any]) -> None:
    rows = report["agreement"]
    axes.set_title("teachers that name the ensemble's class", loc="left")
    if not rows:
        axes.text(0.5, 0.5, "not known", ha="center", color="0.4", transform=axes.transAxes)
        return
    total = sum(row["images"] for row in rows)
    teachers = len(report["teachers"])
    shares = [100 * row["images"] / total for row in rows]
    bars = axes.bar(range(len(rows)), shares, color="0.8", width=0.6)
    known = [row["accuracy"] for row in rows]
    axes.bar_label(
        bars,
        [f"{s:.1f} %" + ("" if a is None else f"\n{100 * a:.0f} % right") for s, a in
         zip(shares, known, strict=True)],
        padding=3,
    )  # fmt: skip
    names = [f"{round(row['agreement'] * teachers)} of {teachers}" for row in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.set_ylim(0, 1.25 * max(shares))
    axes.set_xlim(-0.6, max(len(rows), 3) - 0.4)
    axes.set_ylabel("images (%)")


def _color(name: str) -> str:
    return _COLORS.get(name, "C4")


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"
