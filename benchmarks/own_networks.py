"""Networks that no library builds by name, as a user's own code would hold them, for models.py."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def block(inputs: int, outputs: int, activation: type[nn.Module], size: int = 3) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), activation())


class UNet(nn.Module):
    """Ronneberger et al. 2015 (arXiv 1505.04597), with padding and batch norm: maps of classes."""

    def __init__(
        self, num_classes: int, channels: int = 1, width: int = 32, depth: int = 4
    ) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            self._pair(before, after)
            for before, after in zip([channels, *widths[:-1]], widths, strict=True)
        )
        turned = widths[::-1]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(below, above, 2, stride=2) for below, above in pairwise(turned)
        )
        self.joined = nn.ModuleList(self._pair(2 * above, above) for above in turned[1:])
        self.head = nn.Conv2d(width, num_classes, 1)

    @staticmethod
    def _pair(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(block(inputs, outputs, nn.ReLU), block(outputs, outputs, nn.ReLU))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, num_classes, H, W)."""
        kept = []
        for index, level in enumerate(self.down):
            x = level(F.max_pool2d(x, 2) if index else x)
            kept.append(x)
        for up, joined, before in zip(self.up, self.joined, kept[-2::-1], strict=True):
            x = joined(torch.cat([before, up(x)], 1))
        return self.head(x)


class _C2f(nn.Module):
    """Split, bottlenecks one after another, and all of them concatenated."""

    def __init__(self, inputs: int, outputs: int, repeats: int) -> None:
        super().__init__()
        half = outputs // 2
        self.first = block(inputs, outputs, nn.SiLU, 1)
        self.inner = nn.ModuleList(
            nn.Sequential(block(half, half, nn.SiLU), block(half, half, nn.SiLU))
            for _ in range(repeats)
        )
        self.last = block((2 + repeats) * half, outputs, nn.SiLU, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for inner in self.inner:
            parts.append(parts[-1] + inner(parts[-1]))
        return self.last(torch.cat(parts, 1))


class _SPPF(nn.Module):
    """Poolings one after another, concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = block(width, width // 2, nn.SiLU, 1)
        self.last = block(2 * width, width, nn.SiLU, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """The shape of a YOLOv8: C2f, SPPF, SiLU, a path up and down, heads at three scales."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(5)]
        self.stem = block(3, widths[0], nn.SiLU)
        self.levels = nn.ModuleList(
            nn.Sequential(block(before, after, nn.SiLU), _C2f(after, after, 1))
            for before, after in pairwise(widths)
        )
        self.pyramid = _SPPF(widths[4])
        self.up1 = _C2f(widths[4] + widths[3], widths[3], 1)
        self.up2 = _C2f(widths[3] + widths[2], widths[2], 1)
        self.down1 = _C2f(widths[2] + widths[3], widths[3], 1)
        self.down2 = _C2f(widths[3] + widths[4], widths[4], 1)
        outputs = 4 + num_classes
        self.heads = nn.ModuleList(
            nn.Sequential(block(width, width, nn.SiLU), nn.Conv2d(width, outputs, 1))
            for width in widths[2:]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (N, 3, H, W) to boxes and classes (N, 4 + num_classes, h, w) at three scales."""
        x = self.stem(x)
        found = []
        for level in self.levels:
            x = level(F.max_pool2d(x, 2))
            found.append(x)
        _, fine, middle, coarse = found
        coarse = self.pyramid(coarse)
        middle = self.up1(torch.cat([F.interpolate(coarse, scale_factor=2.0), middle], 1))
        fine = self.up2(torch.cat([F.interpolate(middle, scale_factor=2.0), fine], 1))
        middle = self.down1(torch.cat([F.max_pool2d(fine, 2), middle], 1))
        coarse = self.down2(torch.cat([F.max_pool2d(middle, 2), coarse], 1))
        return [head(x) for head, x in zip(self.heads, (fine, middle, coarse), strict=True)]


def backbone_of(detector: str) -> nn.Module:
    """Return the backbone of a detector of torchvision's: features at several scales."""
    from torchvision.models import get_model

    return get_model(detector, weights=None, weights_backbone=None).backbone
