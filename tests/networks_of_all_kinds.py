"""Small networks that are no plain classifiers, with random weights."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.compression.fitting.statistics import measure_batch_norm


def block(inputs: int, outputs: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), activation())


class UNet(nn.Module):
    """One level down and up again, with a skip connection: a map of classes or of values."""

    def __init__(self, channels: int = 1, outputs: int = 4, width: int = 16) -> None:
        super().__init__()
        self.first = block(channels, width)
        self.down = nn.Sequential(nn.MaxPool2d(2), block(width, 2 * width))
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.last = block(2 * width, width)
        self.head = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        return self.head(self.last(torch.cat([skip, self.up(self.down(skip))], 1)))


class Yolo(nn.Module):
    """Split and concatenation (C2f), pooling in a row (SPPF), SiLU, and heads at two scales."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = block(3, width, nn.SiLU)
        self.split1 = nn.Conv2d(width, width, 1)
        self.inner = block(width // 2, width // 2, nn.SiLU)
        self.split2 = nn.Conv2d(3 * width // 2, 2 * width, 1)
        self.reduce = nn.Conv2d(2 * width, width, 1)
        self.expand = nn.Conv2d(4 * width, 2 * width, 1)
        self.head1 = nn.Conv2d(2 * width, 12, 1)
        self.head2 = nn.Conv2d(2 * width, 12, 1)
        self.register_buffer("anchors", torch.rand(2, 2))

    def forward(self, x: Tensor) -> dict:
        x = self.stem(x)
        one, other = self.split1(x).chunk(2, 1)
        fine = F.silu(self.split2(torch.cat([one, other, self.inner(other)], 1)))
        x = F.silu(self.reduce(F.max_pool2d(fine, 2)))
        pooled = [x]
        for _ in range(3):
            pooled.append(F.max_pool2d(pooled[-1], 3, 1, 1))
        coarse = F.silu(self.expand(torch.cat(pooled, 1)))
        maps = [self.head1(fine), self.head2(coarse)]
        return {"maps": maps, "anchors": self.anchors, "levels": 2}


class Embedding(nn.Module):
    """Unit vectors."""

    def __init__(self, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            block(channels, width), block(width, 2 * width), block(2 * width, 2 * width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.body(x).mean((2, 3)), dim=1)


@dataclass
class Found:
    """Logits, a box and, further in, features."""

    logits: Tensor
    box: Tensor
    more: tuple[Tensor, ...]
    name: str = "found"


class Several(nn.Module):
    """A dataclass of outputs."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = block(3, width)
        self.trunk = block(width, 2 * width)
        self.side = block(2 * width, 2 * width)
        self.logits = nn.Linear(2 * width, 5)
        self.box = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Found:
        features = self.trunk(self.stem(x))
        pooled = self.side(features).mean((2, 3))
        # The box is no linear layer's own output.
        box = self.box(features.mean((2, 3))).sigmoid()
        return Found(self.logits(pooled), box, (features,))


class Pair(nn.Module):
    """Two images of different sizes and a number of a kind, which need all to be there."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.left, self.right = block(3, width), block(1, width)
        self.trunk = nn.Sequential(block(2 * width, 2 * width), block(2 * width, 2 * width))
        self.kinds = nn.Embedding(7, 2 * width)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, left: Tensor, right: Tensor, kind: Tensor) -> Tensor:
        right = F.interpolate(self.right(right), left.shape[2:])
        x = self.trunk(torch.cat([self.left(left), right], 1)).mean((2, 3))
        return self.head(x + self.kinds(kind))


def pictures_of(channels: int, count: int = 32, size: int = 12, seed: int = 1) -> Tensor:
    """Images whose neighbouring pixels are alike."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(count, channels, size, size, generator=generator)
    return raw + 2 * F.avg_pool2d(raw, 3, 1, 1)


def ready(network: nn.Module, images: Tensor | None = None) -> nn.Module:
    """Return `network` in eval mode; its batch norms know `images`."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.5)
    if images is not None:
        measure_batch_norm(network, images, len(images))
    return network.eval()
