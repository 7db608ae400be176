"""Training curves: what the journals of a run say of each training, and charts of it."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from plotly import graph_objects as go

from sbf_dist.report.contents import Curve
from sbf_dist.report.style import Chart, color, empty_figure, series_name
from sbf_dist.tracking import journal

_MOST_POINTS = 400  # of a line; of longer trainings, means of neighbouring points
_LOSS = "loss"
_METRICS = (_LOSS, "lr", "images_per_s", "top1", "divergence", "cross_entropy")
_DASHES = ("solid", "dash", "dot", "dashdot")
# Stages that say something of a network which is no training of it.
_NO_TRAININGS = ("run", "evaluate", "export", "compress", "prepare", "pseudo-labels")


def read_curves(tracking: Path) -> list[Curve]:
    """Return what the journals in a run's folder say of trainings, in the order of their begin."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    stages = [f for f in sorted(tracking.glob("*")) if f.is_dir() and f.name not in _NO_TRAININGS]
    paths = [path for stage in stages for path in journal.files(stage)]
    for path in sorted(paths, key=lambda path: path.name):  # which begins with the time
        for entry, _ in journal.read(path):
            for key, value in entry.get("metrics", {}).items():
                network, _, metric = key.partition("/")
                if metric in _METRICS:
                    number = value if isinstance(value, int | float) else math.nan
                    found[network][metric][entry["step"]] = float(number)
    return [
        Curve(network, {metric: _line(points) for metric, points in series.items()})
        for network, series in found.items()
        if _LOSS in series
    ]


def curve_charts(runs: Sequence[tuple[str, Sequence[Curve]]]) -> list[Chart]:
    """Draw the trainings of runs, each with a letter ("" for one alone)."""
    networks = list(dict.fromkeys(c.network for _, curves in runs for c in curves))
    several = " Of several runs, lines are solid, dashed, dotted in their order."
    more = several if len(runs) > 1 else ""
    known = {
        metric
        for _, curves in runs
        for curve in curves
        for metric, (steps, _) in curve.series.items()
        if metric != "top1" or len(steps) > 1  # at the end of a training it is in the table
    }
    charts = [
        Chart(
            "training-loss",
            "Training loss",
            "Training loss on a logarithmic axis: lower is better. Losses of different trainings "
            f"cannot be compared.{more}",
            _lines(runs, networks, _LOSS, "step", "loss", log=True),
        )
    ]
    if "divergence" in known:
        charts.append(
            Chart(
                "training-divergence",
                "Distance from the teachers",
                "KL divergence of the student from the ensemble's predictions, a part of its "
                f"loss: how much it still differs.{more}",
                _lines(runs, networks, "divergence", "step", "KL divergence", log=True),
            )
        )
    if "images_per_s" in known:
        charts.append(
            Chart(
                "training-speed",
                "Training speed",
                f"Images that all workers together train on in a second.{more}",
                _lines(runs, networks, "images_per_s", "step", "images/s"),
            )
        )
    if "top1" in known:
        charts.append(
            Chart(
                "training-accuracy",
                "Validation accuracy during training",
                f"Share of the validation images that are classified correctly.{more}",
                _lines(runs, networks, "top1", "step", "top-1 accuracy"),
            )
        )
    return charts


def _lines(
    runs: Sequence[tuple[str, Sequence[Curve]]],
    networks: Sequence[str],
    metric: str,
    x: str,
    y: str,
    *,
    log: bool = False,
) -> go.Figure:
    figure = empty_figure(x, y, height=300)
    for run, (letter, curves) in enumerate(runs):
        for curve in curves:
            if metric not in curve.series:
                continue
            steps, values = curve.series[metric]
            figure.add_trace(
                go.Scatter(
                    x=steps,
                    # JSON has no NaN; a gap in the line it is.
                    y=[value if math.isfinite(value) else None for value in values],
                    mode="lines" if len(steps) > 1 else "markers",
                    name=f"{letter} {curve.network}".strip(),
                    line={
                        "color": color(series_name(networks.index(curve.network))),
                        "width": 1.8,
                        "dash": _DASHES[run % len(_DASHES)],
                    },
                )
            )
    figure.update_layout(hovermode="x unified", showlegend=True)
    figure.update_xaxes(rangemode="tozero")
    if log:
        values = [v for trace in figure.data for v in trace.y if v is not None and v > 0]
        ticks = _decades(values)
        figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks])
    else:
        figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(showgrid=False, ticks="outside", tickcolor=color("line"))
    return figure


def _decades(values: Sequence[float]) -> list[float]:
    """Return marks of a logarithmic axis: of few decades also 2 and 5."""
    if not values:
        return []
    first, last = (math.floor(math.log10(v)) for v in (min(values), max(values)))
    marks = (1, 2, 5) if last - first < 3 else (1,)
    return [float(f"{mark}e{power}") for power in range(first, last + 2) for mark in marks]


def _line(points: dict[int, float]) -> tuple[list[int], list[float]]:
    """Return steps and values by ascending step, not too many of them."""
    steps = sorted(points)
    width = math.ceil(len(steps) / _MOST_POINTS)
    parts = [steps[start : start + width] for start in range(0, len(steps), width)]
    return (
        [part[-1] for part in parts],
        [sum(points[step] for step in part) / len(part) for part in parts],
    )
