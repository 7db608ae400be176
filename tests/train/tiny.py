"""A task and a loader that train in milliseconds, for the tests of training."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 7
Batch = dict[str, Tensor]


class TinyTask(nn.Module):
    """A convolution, a batch norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, CLASSES),
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.student(batch["image"]), batch["label"])
        return {"label": loss.detach(), "loss": loss}


def images(ids: Tensor) -> Batch:
    """The images with these ids; each class has a colour."""
    label = ids % CLASSES
    colour = torch.stack([label % 2, label // 2 % 2, label // 4], dim=1).float()
    noise = torch.stack(
        [torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(int(i))) for i in ids]
    )
    return {"image": 2 * colour[:, :, None, None] + 0.5 * noise, "label": label, "id": ids}


class TinyLoader:
    """Endless: step k gives rank r the ids k·b·R + r·b … + b − 1. Its state counts the samples."""

    def __init__(self, rank: int, world_size: int, batch_size: int = 16) -> None:
        self.rank, self.world_size, self.batch_size = rank, world_size, batch_size
        self.seen = 0

    def __iter__(self) -> "TinyLoader":
        return self

    def __next__(self) -> Batch:
        first = self.seen + self.rank * self.batch_size
        self.seen += self.batch_size * self.world_size
        return images(torch.arange(first, first + self.batch_size))

    def state_dict(self) -> dict[str, Any]:
        return {"samples_seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["samples_seen"]
