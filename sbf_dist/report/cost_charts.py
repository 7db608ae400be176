"""Accuracy over what networks cost, with the line of those that none beats in both."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from plotly import graph_objects as go

from sbf_dist.report.style import Chart, color, empty_figure, series_name

Row = Mapping[str, Any]
_LEAST_RANGE = 6.0  # points of accuracy that a chart shows at least
_RANGE = 2.5  # times the distance of the best from the median: what lies lower is at the edge


def accuracy_over_cost(runs: Sequence[tuple[str, Sequence[Row]]]) -> list[Chart]:
    """Draw the rows of runs, each with a letter ("" for one alone), over their costs.

    A cost that is known of no row has no chart.
    """
    charts = [
        _chart(
            runs,
            "macs",
            1e6,
            "Accuracy and multiply-adds",
            "multiply-adds of one image (M)",
            "accuracy-macs",
        ),
        _chart(
            runs,
            "latency_ms",
            1.0,
            "Accuracy and measured time",
            "time of one image (ms)",
            "accuracy-time",
        ),
    ]
    return [chart for chart in charts if chart.figure.data]


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (cost, accuracy) that none beats in both, by ascending cost."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def row_label(letter: str, number: int) -> str:
    """Return what a row is called in the charts and in the table: 3, or B3 of several runs."""
    return f"{letter}{number}"


def row_color(row: Row, run: int, of: int) -> str:
    """Return the name of a row's colour: by run where there are several, else ours or others'."""
    if of > 1:
        return series_name(run)
    return "blue" if row["network"].startswith("sbf") else "grey"


def _chart(
    runs: Sequence[tuple[str, Sequence[Row]]],
    key: str,
    unit: float,
    title: str,
    axis: str,
    name: str,
) -> Chart:
    known = [
        (run, number, row)
        for run, (_, rows) in enumerate(runs)
        for number, row in enumerate(rows, 1)
        if row["top1"] is not None and row.get(key) is not None
    ]
    figure = empty_figure(axis, "top-1 accuracy (%)", height=360, showlegend=False)
    points = [(row[key] / unit, 100 * row["top1"]) for _, _, row in known]
    bottom, top = _range([accuracy for _, accuracy in points])
    front = pareto(points)
    if front:
        most = max(cost for cost, _ in points)
        figure.add_trace(
            go.Scatter(
                x=[cost for cost, _ in front] + [most],
                y=[accuracy for _, accuracy in front] + [front[-1][1]],
                mode="lines",
                name="Pareto line",
                line={"shape": "hv", "color": color("grey"), "width": 1.5},
                hoverinfo="skip",
            )
        )
    for (run, number, row), (cost, accuracy) in zip(known, points, strict=True):
        below = accuracy < bottom
        letter = runs[run][0]
        figure.add_trace(
            go.Scatter(
                x=[cost],
                y=[max(accuracy, bottom)],
                mode="markers+text",
                name=row["name"],
                text=[row_label(letter, number)],
                textfont={"color": color("page"), "size": 11},
                customdata=[accuracy],
                hovertemplate=f"{letter and letter + ' · '}{_escaped(row['name'])}<br>"
                f"%{{customdata:.1f}} %, %{{x:.4~g}}<extra></extra>",
                marker={
                    "size": 32 if below else 23,
                    "symbol": "triangle-down" if below else "circle",
                    "color": color(row_color(row, run, len(runs))),
                    "line": {"color": color("page"), "width": 1.5},
                },
                cliponaxis=False,
            )
        )
    figure.update_yaxes(range=[bottom - 0.06 * (top - bottom), top + 0.1 * (top - bottom)])
    figure.update_xaxes(rangemode="tozero", range=[0, 1.08 * max([1e-9, *(c for c, _ in points)])])
    reading = (
        "Each number is a row of the table. Up and left is better: no network beats one on the "
        "grey line in both. "
    )
    if any(accuracy < bottom for _, accuracy in points):
        reading += "A triangle stands for a network below the chart's range. "
    unknown = [row["name"] for _, rows in runs for row in rows if row.get(key) is None]
    if unknown:
        reading += f"Not measured, as the machine was busy: {', '.join(unknown)}."
    return Chart(name, title, reading.strip(), figure)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of accuracies that is shown: an outlier below must not press the rest."""
    if not values:
        return 0.0, 100.0
    top = max(values)
    height = max(_LEAST_RANGE, _RANGE * (top - median(values)))
    return max(min(values), top - height), top


def _escaped(text: str) -> str:
    """Plotly reads texts as a kind of HTML, and % { as the beginning of a value."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("%{", "% {")
