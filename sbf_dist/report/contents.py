"""What the page on a run shows, as plain data; how it is found is the business of the launchers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbf_dist.compression.plan import Plan


@dataclass(frozen=True)
class Missing:
    """A part that a run does not have; `why` is a sentence that says what would make it."""

    why: str


@dataclass(frozen=True)
class Curve:
    """What the training of one network logged: by metric, steps and values (NaN: not finite)."""

    network: str
    series: Mapping[str, tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Source:
    """One of the kept channels that a channel is rebuilt from.

    kernel  float32 (m, m), the transformation of its features
    """

    channel: int
    kernel: NDArray[np.float32]


@dataclass(frozen=True)
class RebuiltChannel:
    """One channel that is rebuilt, beside that of the dense network.

    channel            its number in the dense network
    sources            those that weigh most, in this order; `more` are left out
    dense, rebuilt     its filters, float32 (inputs, k, k); None where no filter equals the layer
    dense_map, …       its feature maps of the picture, float32 (H, W); None without a picture
    error              share of the map's variance that is not rebuilt
    """

    channel: int
    sources: Sequence[Source]
    more: int
    dense: NDArray[np.float32] | None = None
    rebuilt: NDArray[np.float32] | None = None
    dense_map: NDArray[np.float32] | None = None
    rebuilt_map: NDArray[np.float32] | None = None
    error: float | None = None


@dataclass(frozen=True)
class LayerView:
    """One converted layer.

    kept      by channel, filters that are kept, float32 (inputs, k, k); the first of `kept_of`
    channels  some of those that are rebuilt, from the best to the worst; of `rebuilt_of`
    """

    name: str
    kept: Mapping[int, NDArray[np.float32]]
    kept_of: int
    channels: Sequence[RebuiltChannel]
    rebuilt_of: int
    transform_size: int


@dataclass(frozen=True)
class Layers:
    """Some converted layers of one network, and the picture that it saw, uint8 (H, W, 3)."""

    network: str
    views: Sequence[LayerView]
    picture: NDArray[np.uint8] | Missing


@dataclass(frozen=True)
class Example:
    """A validation image that was classified wrongly; its picture is uint8 (H, W, 3)."""

    label: int
    predicted: int
    confidence: float
    picture: NDArray[np.uint8]


@dataclass(frozen=True)
class Predictions:
    """What a network answers on validation images.

    counts    int64 (classes, classes): images of each true class (row) and predicted one (column)
    images    how many were looked at, of `available`
    examples  some of those that are wrong, of the commonest confusions first
    """

    network: str
    classes: Sequence[str]
    counts: NDArray[np.int64]
    images: int
    available: int
    examples: Sequence[Example]


@dataclass(frozen=True)
class Stage:
    """A stage of a run: whether it is done, the seconds that it took, and its code's versions."""

    name: str
    done: bool
    seconds: float | None
    versions: Mapping[str, str]


@dataclass(frozen=True)
class RunContents:
    """One run.

    rows        of the table of results, as the summary has them
    compressed  name of the row of the network that was compressed
    student     name of the row of what became of it, by stage; the last that has a row counts
    labels      figures of the pseudo-labels, as the labels' report has them
    recipe      as it is kept, nested
    """

    name: str
    place: str
    rows: Sequence[Mapping[str, Any]] | Missing
    compressed: str | None
    students: Sequence[str]
    plan: Plan | Missing
    layers: Layers | Missing
    curves: Sequence[Curve] | Missing
    labels: Mapping[str, Any] | Missing
    predictions: Predictions | Missing
    recipe: Mapping[str, Any] | Missing
    stages: Sequence[Stage]

    def row(self, network: str | None) -> Mapping[str, Any] | None:
        """Return the row of a network; None where there is none."""
        if isinstance(self.rows, Missing):
            return None
        return next((row for row in self.rows if row["network"] == network), None)

    @property
    def student(self) -> Mapping[str, Any] | None:
        """The row of the smaller network that is furthest."""
        found = [row for name in self.students if (row := self.row(name)) is not None]
        return found[-1] if found else None
