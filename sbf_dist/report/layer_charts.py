"""Layers on the page: what of each was kept, rebuilt and removed, and what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass

from plotly import graph_objects as go

from sbf_dist.compression.plan import Plan, SBFLayer
from sbf_dist.report.style import Chart, color, empty_figure

_ROW = 21  # pixels of a layer
_MOST_NAME = 23  # characters


@dataclass(frozen=True)
class LayerRow:
    """One convolution of a plan; multiply-adds of one image. None: not known, or dense."""

    name: str
    kept: int | None
    rebuilt: int | None
    removed: int
    sources: int | None
    transform_size: int | None
    macs_before: int
    macs_after: int
    error: float | None
    reason: str

    @property
    def converted(self) -> bool:
        return self.kept is not None


def layer_rows(plan: Plan) -> list[LayerRow]:
    """Return the convolutions of a plan in forward order."""
    found = []
    for name, layer in plan.layers.items():
        removed = len(plan.removed[name].out) if name in plan.removed else 0
        if isinstance(layer, SBFLayer):
            row = LayerRow(
                name,
                kept=len(layer.kept),
                rebuilt=layer.channels - len(layer.kept),
                removed=removed,
                sources=len(layer.sources[0]) if layer.sources else None,
                transform_size=layer.transform_size,
                macs_before=layer.macs_before,
                macs_after=layer.macs_after,
                error=layer.error,
                reason=layer.reason,
            )
        else:
            row = LayerRow(
                name,
                kept=None,
                rebuilt=None,
                removed=removed,
                sources=None,
                transform_size=None,
                macs_before=layer.macs,
                macs_after=layer.macs,
                error=None,
                reason=layer.reason,
            )
        found.append(row)
    return found


def layer_charts(plan: Plan, name: str) -> list[Chart]:
    """Draw channels and multiply-adds of each layer; `name` begins the names of the charts."""
    rows = layer_rows(plan)
    changed = any(row.converted or row.removed for row in rows)
    return [*([_channels(rows, name)] if changed else []), _macs(rows, name)]


def _channels(rows: Sequence[LayerRow], name: str) -> Chart:
    parts = {
        "kept": ("blue", [row.kept or 0 for row in rows]),
        "rebuilt": ("orange", [row.rebuilt or 0 for row in rows]),
        "removed": ("red", [row.removed for row in rows]),
    }
    figure = _bars("output channels", rows)
    for part, (hue, numbers) in parts.items():
        if any(numbers):
            figure.add_trace(_bar(rows, part, numbers, hue, "%{customdata}: %{x} " + part))
    return Chart(
        f"{name}-channels",
        "Channels of each layer",
        "Layers in forward order. Kept channels still have a filter, rebuilt ones are made of "
        "these, removed ones are gone. Layers without a bar are as they were.",
        figure,
    )


def _macs(rows: Sequence[LayerRow], name: str) -> Chart:
    figure = _bars("multiply-adds of one image (M)", rows)
    left = [row.macs_after / 1e6 for row in rows]
    saved = [max(0.0, (row.macs_before - row.macs_after) / 1e6) for row in rows]
    figure.add_trace(_bar(rows, "left", left, "blue", "%{customdata}: %{x:.4~g} M left"))
    figure.add_trace(_bar(rows, "saved", saved, "pale", "%{customdata}: %{x:.4~g} M saved"))
    return Chart(
        f"{name}-layer-cost",
        "What each layer costs",
        "A whole bar is the layer before compression, the blue part what is left of it.",
        figure,
    )


def _bars(title: str, rows: Sequence[LayerRow]) -> go.Figure:
    figure = empty_figure(
        title, "", height=90 + _ROW * len(rows), barmode="stack", bargap=0.3, showlegend=True
    )
    figure.update_yaxes(
        autorange="reversed",
        tickvals=list(range(len(rows))),
        ticktext=[_short(row.name) for row in rows],
        showgrid=False,
        tickfont={"size": 11},
    )
    figure.update_layout(legend={"traceorder": "normal", "y": 1.0, "yref": "container"})
    figure.update_layout(legend={"yanchor": "top"}, margin={"t": 30})
    return figure


def _bar(
    rows: Sequence[LayerRow], name: str, values: Sequence[float], hue: str, hover: str
) -> go.Bar:
    return go.Bar(
        orientation="h",
        x=list(values),
        y=list(range(len(rows))),
        customdata=[row.name for row in rows],
        name=name,
        marker={"color": color(hue)},
        hovertemplate=f"{hover}<extra></extra>",
    )


def _short(name: str) -> str:
    """Leave the middle of a long name out: its ends tell layers apart."""
    if len(name) <= _MOST_NAME:
        return name
    half = (_MOST_NAME - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
