"""How the page's charts look: one palette for light and dark, and figures without plotly's own."""

from dataclasses import dataclass
from typing import Any

from plotly import graph_objects as go

# By name, on a light and on a dark page. Charts are made with the first; the page exchanges them.
COLORS = {
    "page": ("#ffffff", "#0e131a"),
    "raised": ("#f5f7fa", "#161d27"),
    "line": ("#dde2ea", "#2b3542"),
    "ink": ("#18202c", "#e7ebf1"),
    "muted": ("#586375", "#9ba7b6"),
    "blue": ("#1464c0", "#62adff"),
    "orange": ("#c05409", "#ff9f5a"),
    "green": ("#1b7f4b", "#4fc98f"),
    "violet": ("#7048c2", "#b69bff"),
    "red": ("#c22f47", "#ff7d8e"),
    "teal": ("#0e7c86", "#4cc6d0"),
    "grey": ("#7c8798", "#8b97a7"),
    "pale": ("#cfd6e0", "#3a4654"),
}
SERIES = ("blue", "orange", "green", "violet", "red", "teal", "grey")
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Chart:
    """A chart of the page; `reading` says in a line what it shows and how to read it."""

    name: str
    title: str
    reading: str
    figure: go.Figure


def color(name: str) -> str:
    """Return a colour of the palette, as charts have it."""
    return COLORS[name][0]


def series_name(number: int) -> str:
    """Return the name of the colour of one of several series."""
    return SERIES[number % len(SERIES)]


def empty_figure(x: str, y: str, *, height: int = 340, **layout: Any) -> go.Figure:
    """Return a figure without data, with titles of its axes and the page's look."""
    axis = {
        "gridcolor": color("line"),
        "linecolor": color("line"),
        "zeroline": False,
        "automargin": True,
        "tickfont": {"color": color("muted"), "size": 12},
    }
    return go.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": _FONT, "color": color("ink"), "size": 13},
            "hoverlabel": {
                "bgcolor": color("raised"),
                "bordercolor": color("line"),
                "font": {"color": color("ink"), "family": _FONT},
                "align": "left",
            },
            "legend": {
                "orientation": "h",
                "yanchor": "bottom",
                "y": 1.02,
                "x": 0,
                "font": {"size": 12, "color": color("ink")},
                "itemsizing": "constant",
            },
            "xaxis": axis | {"title": {"text": x, "font": {"size": 12, "color": color("muted")}}},
            "yaxis": axis | {"title": {"text": y, "font": {"size": 12, "color": color("muted")}}},
        }
    ).update_layout(layout)
