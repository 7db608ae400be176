"""In which order the channels of a coupled group go, and what the network loses by it."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """Channels in the order in which they go.

    losses[k]: by the first k + 1 of them; the more go, the more each costs.
    """

    channels: list[int]
    losses: list[float]

    @classmethod
    def of_scores(cls, scores: Tensor) -> Self:
        """Put channels in order by how much each matters, which adds up."""
        order = scores.argsort(stable=True)
        return cls(order.tolist(), scores[order].cumsum(0).tolist())

    @classmethod
    def of_losses(cls, channels: list[int], losses: np.ndarray) -> Self:
        """Take the largest convex function below the `losses`: steps are then never too small.

        An estimate that grows slower for a while would draw in channels beyond it for nothing.
        """
        x, y = np.arange(len(losses) + 1), np.concatenate([[0.0], losses])
        corners: list[int] = []
        for point in x:
            while len(corners) > 1:
                before, last = corners[-2:]
                if (y[last] - y[before]) * (point - last) < (y[point] - y[last]) * (last - before):
                    break
                corners.pop()
            corners.append(int(point))
        return cls(channels, np.interp(x[1:], corners, y[corners]).tolist())

    def loss(self, channels: int) -> float:
        """Return what the network loses by the first so many channels."""
        return self.losses[channels - 1] if channels else 0.0
