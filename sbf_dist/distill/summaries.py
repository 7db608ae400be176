"""What is kept of the teachers' predictions: a few numbers of each image."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """The predictions on N images.

    classes        int64 (N, k): the ensemble's most probable classes, descending
    probabilities  float32 (N, k): theirs
    entropy        float32 (N,): of the ensemble's whole distribution, nats
    margin         float32 (N,): between its two most probable classes, as probabilities
    agreement      float32 (N,): share of the teachers whose first class is the ensemble's; all
                   teachers count alike
    """

    classes: Tensor
    probabilities: Tensor
    entropy: Tensor
    margin: Tensor
    agreement: Tensor

    @classmethod
    def of(cls, mean: Tensor, each: Sequence[Tensor], top_k: int) -> Self:
        """Summarise the ensemble's probabilities, (N, classes), and those of its teachers.

        Where there are fewer than `top_k` classes, all are kept.
        """
        top = mean.topk(min(max(top_k, 2), mean.shape[1]), dim=1)
        first = top.indices[:, 0]
        agreeing = torch.stack([one.argmax(1) == first for one in each])
        second = top.values[:, 1] if mean.shape[1] > 1 else 0.0
        return cls(
            classes=top.indices[:, :top_k],
            probabilities=top.values[:, :top_k],
            entropy=torch.special.entr(mean).sum(1),
            margin=top.values[:, 0] - second,
            agreement=agreeing.float().mean(0),
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return several summaries as one."""
        return cls(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)})

    def __len__(self) -> int:
        return len(self.entropy)

    def __getitem__(self, rows: slice) -> Self:
        return type(self)(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})
