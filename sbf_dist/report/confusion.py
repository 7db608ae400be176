"""Confusions of a network: which classes it takes for which, as numbers and as a chart."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sbf_dist.report.contents import Predictions
from sbf_dist.report.style import Chart, color, empty_figure

_MOST_CLASSES = 20  # of the chart; of more, those with the most mistakes
_MOST_NAME = 14  # characters
_MOST_OF_ONE = 4  # pictures of one confusion


def count(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """Return the images of each true class (row) and predicted class (column)."""
    flat = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return flat.reshape(classes, classes)


def commonest(counts: NDArray[np.int64], most: int) -> list[tuple[int, int, int]]:
    """Return the commonest confusions: true class, predicted class, images."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [(int(i) // len(counts), int(i) % len(counts)) for i in order]
    return [
        (true, predicted, int(wrong[true, predicted]))
        for true, predicted in pairs
        if wrong[true, predicted]
    ]


def worst_images(
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    confidence: NDArray[np.float32],
    counts: NDArray[np.int64],
    most: int,
) -> list[int]:
    """Return places of wrong images: of the commonest confusions first, there the surest.

    Of one confusion there are a few at most, so that others are seen, too.
    """
    wrong = np.flatnonzero(labels != predicted)
    often = counts[labels[wrong], predicted[wrong]]
    keys = (-confidence[wrong], predicted[wrong], labels[wrong], -often)
    found: list[int] = []
    seen: Counter[tuple[int, int]] = Counter()
    for place in wrong[np.lexsort(keys)].tolist():
        pair = int(labels[place]), int(predicted[place])
        seen[pair] += 1
        if seen[pair] <= _MOST_OF_ONE:
            found.append(place)
    return found[:most]


def confusion_chart(found: Predictions, name: str) -> Chart:
    """Draw shares of each true class; `name` begins the name of the chart."""
    shown = _shown(found.counts)
    counts = found.counts[np.ix_(shown, shown)]
    totals = found.counts[shown].sum(1, keepdims=True).clip(min=1)
    shares = (100 * counts / totals).round(1)
    names = [_short(str(found.classes[c])) for c in shown]
    places = list(range(len(shown)))
    figure = empty_figure("predicted class", "true class", height=110 + max(220, 26 * len(shown)))
    figure.add_heatmap(
        z=shares.tolist(),
        x=places,
        y=places,
        customdata=counts.tolist(),
        text=[[str(n) if n else "" for n in row] for row in counts.tolist()],
        texttemplate="%{text}" if len(shown) <= _MOST_CLASSES else None,
        textfont={"size": 11},
        colorscale=[[0, color("page")], [1, color("blue")]],
        zmin=0,
        zmax=100,
        xgap=1,
        ygap=1,
        colorbar={
            "ticksuffix": " %",
            "thickness": 10,
            "outlinewidth": 0,
            "tickfont": {"color": color("muted"), "size": 11},
        },
        hovertemplate="true %{y}, predicted %{x}: %{customdata} images, %{z} %<extra></extra>",
    )
    ticks = {"tickvals": places, "ticktext": names, "showgrid": False}
    figure.update_xaxes(side="bottom", **ticks)
    figure.update_yaxes(autorange="reversed", **ticks)
    reading = (
        "Rows are true classes, columns predicted ones. Numbers are images, colours shares of "
        "the row. Errors lie off the diagonal."
    )
    if len(shown) < len(found.counts):
        reading += f" Of {len(found.counts)} classes, the {len(shown)} with the most mistakes."
    return Chart(f"{name}-confusion", "Which classes are confused", reading, figure)


def _shown(counts: NDArray[np.int64]) -> Sequence[int]:
    if len(counts) <= _MOST_CLASSES:
        return list(range(len(counts)))
    wrong = counts - np.diag(np.diag(counts))
    mistakes = wrong.sum(0) + wrong.sum(1)
    return sorted(np.argsort(-mistakes, kind="stable")[:_MOST_CLASSES].tolist())


def _short(text: str) -> str:
    return text if len(text) <= _MOST_NAME else f"{text[: _MOST_NAME - 1]}…"
