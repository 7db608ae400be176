"""The page on one run, or on several side by side: one HTML file that needs no network."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sbf_dist.report import pictures
from sbf_dist.report.confusion import commonest, confusion_chart
from sbf_dist.report.contents import LayerView, Missing, RebuiltChannel, RunContents
from sbf_dist.report.cost_charts import accuracy_over_cost
from sbf_dist.report.curve_charts import curve_charts
from sbf_dist.report.label_charts import label_charts
from sbf_dist.report.layer_charts import layer_charts, layer_rows
from sbf_dist.report.overview import COLUMNS, NONE, table_rows, tiles, verdict
from sbf_dist.report.recipe_table import key_rows
from sbf_dist.report.style import COLORS, Chart, series_name

_TEMPLATES = Path(__file__).with_name("page")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CONFUSIONS = 8  # that are listed
MOST_RUNS = len(_LETTERS)

LettersAndRuns = Sequence[tuple[str, RunContents]]


def render(runs: Sequence[RunContents]) -> str:
    """Return the page on some runs as HTML."""
    letters = list(_LETTERS[: len(runs)]) if len(runs) > 1 else [""]
    page = _Page(list(zip(letters, runs, strict=True)))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=" and ".join(run.name for run in runs),
        panels=[page.panel(number) for number in range(len(runs))],
        several=len(runs) > 1,
        columns=COLUMNS,
        rows=table_rows(page.runs),
        cost_charts=page.cost_charts(),
        training_charts=page.training_charts(),
        recipe=_recipe(runs),
        versions=_versions(runs),
        style=Markup(_palette() + (_TEMPLATES / "page.css").read_text()),
        script=Markup((_TEMPLATES / "page.js").read_text()),
        plotly=Markup(get_plotlyjs()),
        chart=page.add,
        figures=page.figures_as_json,
    )


@dataclass(frozen=True)
class _Tile:
    """A small picture with what it shows."""

    address: str
    text: str


class _Page:
    """Collects the figures of the charts while the page is written."""

    def __init__(self, runs: LettersAndRuns) -> None:
        self.runs = runs
        self._figures: dict[str, Any] = {}

    def add(self, chart: Chart) -> Chart:
        """Note a chart that the page shows."""
        self._figures[chart.name] = json.loads(chart.figure.to_json())
        return chart

    def figures_as_json(self) -> Markup:
        """Return all figures that were noted, and the colours of a dark page, for page.js."""
        content = {"figures": self._figures, "dark": dict(COLORS.values())}
        # Within a script, only "<" could end it.
        return Markup(json.dumps(content, allow_nan=False).replace("<", "\\u003c"))

    def cost_charts(self) -> list[Chart]:
        known = [(letter, run.rows) for letter, run in self.runs]
        if all(isinstance(rows, Missing) for _, rows in known):
            return []
        return accuracy_over_cost(
            [(letter, [] if isinstance(rows, Missing) else rows) for letter, rows in known]
        )

    def training_charts(self) -> list[Chart]:
        known = [
            (letter, [] if isinstance(run.curves, Missing) else run.curves)
            for letter, run in self.runs
        ]
        return curve_charts(known) if any(curves for _, curves in known) else []

    def panel(self, number: int) -> dict[str, Any]:
        """Return what the page says of one run alone."""
        letter, run = self.runs[number]
        prefix = f"run{number}"
        return {
            "letter": letter,
            "name": run.name,
            "color": series_name(number),
            "place": run.place,
            "verdict": verdict(run),
            "tiles": tiles(run),
            "rows": run.rows,
            "curves": run.curves,
            "stages": run.stages,
            "plan": _given(run.plan, lambda plan: _plan(plan, prefix)),
            "layers": _given(run.layers, _layers),
            "labels": _given(run.labels, lambda report: _labels(report, prefix)),
            "predictions": _given(run.predictions, lambda found: _predictions(found, prefix)),
            "recipe": run.recipe,
        }


def _given(part: Any, show: Callable[[Any], Any]) -> Any:
    return part if isinstance(part, Missing) else show(part)


def _plan(plan: Any, prefix: str) -> dict[str, Any]:
    return {
        "summary": plan.summary(),
        "rows": layer_rows(plan),
        "charts": layer_charts(plan, prefix),
        "explanation": plan.explanation,
    }


def _layers(layers: Any) -> dict[str, Any]:
    picture = layers.picture
    return {
        "network": layers.network,
        "picture": picture
        if isinstance(picture, Missing)
        else _Tile(pictures.of_photo(picture), "the picture that the feature maps are of"),
        "views": [_layer(view) for view in layers.views],
    }


def _layer(view: LayerView) -> dict[str, Any]:
    kept = np.stack(list(view.kept.values()))
    inputs = pictures.strongest_inputs(kept)
    most = float(np.abs(kept).max())
    tiles = {
        channel: _Tile(pictures.of_filter(weights, inputs, most), f"filter of channel {channel}")
        for channel, weights in view.kept.items()
    }
    return {
        "name": view.name,
        "kept": tiles,
        "kept_of": view.kept_of,
        "inputs": len(inputs),
        "inputs_of": kept.shape[1],
        "channels": [_channel(one, inputs, tiles) for one in view.channels],
        "rebuilt_of": view.rebuilt_of,
        "size": view.transform_size,
    }


def _channel(one: RebuiltChannel, inputs: np.ndarray, kept: Mapping[int, _Tile]) -> dict[str, Any]:
    most = max((float(np.abs(source.kernel).max()) for source in one.sources), default=0.0)
    filters, maps = [], []
    if one.dense is not None and one.rebuilt is not None:
        largest = max(float(np.abs(f).max()) for f in (one.dense, one.rebuilt))
        filters = [
            _Tile(pictures.of_filter(weights, inputs, largest), f"{what} filter")
            for what, weights in (("dense", one.dense), ("rebuilt", one.rebuilt))
        ]
    if one.dense_map is not None and one.rebuilt_map is not None:
        both = np.stack([one.dense_map, one.rebuilt_map])
        low, high = np.quantile(both, (0.01, 0.99))
        maps = [
            _Tile(pictures.of_map(values, low, high), f"{what} feature map")
            for what, values in (("dense", one.dense_map), ("rebuilt", one.rebuilt_map))
        ]
    return {
        "number": one.channel,
        "error": None if one.error is None else _percent(one.error),
        "filters": filters,
        "maps": maps,
        "sources": [
            {
                "number": source.channel,
                "filter": kept.get(source.channel),
                "kernel": _Tile(
                    pictures.of_kernel(source.kernel, most),
                    f"transformation of channel {source.channel}",
                ),
                "weight": f"{source.kernel.item():+.2f}" if source.kernel.size == 1 else "",
            }
            for source in one.sources
        ],
        "more": one.more,
    }


def _labels(report: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    def percent(value: float | None) -> str:
        return NONE if value is None else f"{100 * value:.1f}"

    return {
        "charts": label_charts(report, prefix),
        "parts": [
            (
                row["part"],
                row["images"],
                percent(row["confidence"]),
                percent(row["agreement"]),
                percent(row["accuracy"]),
                percent(row["ece"]),
            )
            for row in report["parts"]
        ],
    }


def _predictions(found: Any, prefix: str) -> dict[str, Any]:
    right = int(np.trace(found.counts))
    names = [str(name) for name in found.classes]
    return {
        "network": found.network,
        "images": found.images,
        "available": found.available,
        "right": right,
        "accuracy": f"{100 * right / max(1, found.images):.1f}",
        "chart": confusion_chart(found, prefix),
        "pairs": [(names[t], names[p], n) for t, p, n in commonest(found.counts, _CONFUSIONS)],
        "examples": [
            {
                "picture": pictures.of_photo(one.picture),
                "label": names[one.label],
                "predicted": names[one.predicted],
                "confidence": f"{100 * one.confidence:.0f} %",
            }
            for one in found.examples
        ],
    }


def _recipe(runs: Sequence[RunContents]) -> dict[str, Any]:
    rows = key_rows([None if isinstance(r.recipe, Missing) else r.recipe for r in runs])
    return {"all": rows, "different": [row for row in rows if row.differs]}


def _versions(runs: Sequence[RunContents]) -> list[tuple[str, list[str]]]:
    """Return by what, the version in each run; all that its stages name where they differ."""
    found = [_versions_of(run) for run in runs]
    names = dict.fromkeys(name for versions in found for name in versions)
    return [(name, [versions.get(name, NONE) for versions in found]) for name in names]


def _versions_of(run: RunContents) -> dict[str, str]:
    names = dict.fromkeys(name for stage in run.stages for name in stage.versions)
    return {
        name: ", ".join(dict.fromkeys(s.versions[name] for s in run.stages if name in s.versions))
        for name in names
    }


def _palette() -> str:
    def block(place: int) -> str:
        return "".join(f"--{name}:{pair[place]};" for name, pair in COLORS.items())

    return (
        f":root{{color-scheme:light dark;{block(0)}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{block(1)}}}}}\n"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share < 10 else "over 999 %"
