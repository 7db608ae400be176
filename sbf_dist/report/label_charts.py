"""Pseudo-labels on the page: confidence, reliability, agreement and classes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from plotly import graph_objects as go

from sbf_dist.report.style import Chart, color, empty_figure

_COLORS = {"unlabelled": "grey", "used": "blue", "labelled": "green", "validation": "orange"}
_USED = "used"
_MOST_CLASSES = 40  # that have a bar each


def label_charts(report: Mapping[str, Any], name: str) -> list[Chart]:
    """Draw the figures of a labels' report; `name` begins the names of the charts."""
    charts = [_confidence(report, name)]
    if report["reliability"]:
        charts.append(_reliability(report, name))
    charts.append(_classes(report, name))
    if report["agreement"]:
        charts.append(_agreement(report, name))
    return charts


def _confidence(report: Mapping[str, Any], name: str) -> Chart:
    figure = empty_figure("confidence of the ensemble", "images (%)", height=300)
    for part, counts in _without_repetition(report["confidence"], "unlabelled").items():
        edges = np.linspace(0, 1, len(counts) + 1).round(4).tolist()
        shares = [100 * count / sum(counts) for count in counts]
        figure.add_trace(
            go.Scatter(
                x=edges,
                y=[*shares, shares[-1]],
                name=part,
                mode="lines",
                line={"shape": "hv", "color": _color(part), "width": 2},
            )
        )
    figure.update_layout(hovermode="x unified", showlegend=True)
    figure.update_yaxes(rangemode="tozero")
    return Chart(
        f"{name}-confidence",
        "Confidence of the teachers",
        "The ensemble's confidence in its predicted class. Mass on the right: it is sure of most "
        "images.",
        figure,
    )


def _reliability(report: Mapping[str, Any], name: str) -> Chart:
    figure = empty_figure("confidence of the ensemble", "right (%)", height=300)
    figure.add_trace(
        go.Scatter(
            x=[0, 1],
            y=[0, 100],
            mode="lines",
            line={"color": color("pale"), "width": 2},
            hoverinfo="skip",
            showlegend=False,
        )
    )
    for part, bins in report["reliability"].items():
        if part == _USED:  # they are among those without labels
            continue
        total = sum(one["images"] for one in bins)
        figure.add_trace(
            go.Scatter(
                x=[one["confidence"] for one in bins],
                y=[100 * one["accuracy"] for one in bins],
                customdata=[one["images"] for one in bins],
                name=part,
                mode="lines+markers",
                line={"color": _color(part), "width": 1.6},
                marker={"size": [5 + 18 * (one["images"] / total) ** 0.5 for one in bins]},
                hovertemplate="%{y:.1f} % right of %{customdata} images<extra></extra>",
            )
        )
    figure.update_xaxes(range=[0, 1.03])
    figure.update_yaxes(range=[0, 104])
    figure.update_layout(showlegend=True)
    return Chart(
        f"{name}-reliability",
        "Calibration of the teachers",
        "Of images with a known class: below the grey line the teachers are overconfident, above "
        "it underconfident. Larger points stand for more images.",
        figure,
    )


def _classes(report: Mapping[str, Any], name: str) -> Chart:
    figure = empty_figure("", "images", height=300, barmode="overlay", bargap=0.25)
    predicted = np.array(report["per_class"]["predicted"])
    order = np.argsort(-predicted, kind="stable")
    shown = order[:_MOST_CLASSES].tolist()
    names = [str(report["classes"][c]) for c in shown]
    shown_parts = _without_repetition(report["per_class"], "predicted")
    several = len(shown_parts) > 1
    for part, counts in shown_parts.items():
        figure.add_trace(
            go.Bar(
                x=list(range(len(shown))),
                y=[counts[c] for c in shown],
                name=part,
                customdata=names,
                hovertemplate=f"%{{customdata}}: %{{y}} {part}<extra></extra>",
                marker={
                    "color": color("blue" if part == _USED or len(shown_parts) == 1 else "pale")
                },
            )
        )
    figure.update_xaxes(
        tickvals=list(range(len(shown))), ticktext=[_short(n) for n in names], showgrid=False
    )
    figure.update_layout(showlegend=several)
    left_out = len(order) - len(shown)
    return Chart(
        f"{name}-classes",
        "Images of each predicted class",
        "Uneven bars: some classes dominate the student's training."
        + (f" The {left_out} classes with the fewest images are left out." if left_out else ""),
        figure,
    )


def _agreement(report: Mapping[str, Any], name: str) -> Chart:
    rows, teachers = report["agreement"], len(report["teachers"])
    figure = empty_figure("teachers that name the ensemble's class", "images (%)", height=300)
    total = sum(row["images"] for row in rows)
    texts = [
        "" if row["accuracy"] is None else f"{100 * row['accuracy']:.0f} % right" for row in rows
    ]
    figure.add_trace(
        go.Bar(
            x=[f"{round(row['agreement'] * teachers)} of {teachers}" for row in rows],
            y=[100 * row["images"] / total for row in rows],
            text=texts,
            textposition="outside",
            cliponaxis=False,
            marker={"color": color("blue")},
            width=0.5,
            hovertemplate="%{y:.1f} % of the images<extra></extra>",
        )
    )
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(range=[0, 112])
    return Chart(
        f"{name}-agreement",
        "Do the teachers agree?",
        "Share of the images by how many teachers name the class of the ensemble, and how often "
        "they are right where that is known.",
        figure,
    )


def _without_repetition(counts: Mapping[str, list[int]], whole: str) -> Mapping[str, list[int]]:
    """Leave the images that are used out where all are."""
    if counts.get(_USED) != counts.get(whole):
        return counts
    return {part: numbers for part, numbers in counts.items() if part != _USED}


def _color(part: str) -> str:
    return color(_COLORS.get(part, "violet"))


def _short(text: str, most: int = 12) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
