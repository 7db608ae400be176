"""Networks that are compressed in well under a second."""

import torch
from torch import Tensor, nn

from sbf_dist.compression.fitting.statistics import measure_batch_norm


class Small(nn.Module):
    """A stem, two plain convolutions with batch norm, and a classifier."""

    def __init__(self, *, norm: bool = True, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=not norm)
        self.norm1: nn.Module = nn.BatchNorm2d(2 * width) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1, bias=not norm)
        self.norm2: nn.Module = nn.BatchNorm2d(2 * width) if norm else nn.Identity()
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


class Merging(nn.Conv2d):
    """A low-rank update that `train` adds to the weight for evaluation, as loralib's."""

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **settings)
        self.down = nn.Parameter(torch.randn(2, self.weight[0].numel()))
        self.up = nn.Parameter(torch.randn(len(self.weight), 2))
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if mode == self.merged:
            update = (self.up @ self.down).view_as(self.weight)
            self.weight.data += -update if mode else update
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        update = (self.up @ self.down).view_as(self.weight)
        return self._conv_forward(x, self.weight if self.merged else self.weight + update, None)


class Silent(nn.Sequential):
    """Its `train` returns nothing, as that of mmdetection's backbones."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def small(*, seed: int = 0, **settings) -> nn.Module:
    """A Small in eval mode whose batch norms know `pictures`."""
    torch.manual_seed(seed)
    network = Small(**settings)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.5)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.0)
    measure_batch_norm(network, pictures(64), 64)
    return network


def pictures(count: int = 32, size: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(count, 3, size, size, generator=generator)
    return raw + nn.functional.avg_pool2d(raw, 3, 1, 1)


def small_densenet() -> nn.Module:
    """Two blocks of layers that read all layers before them."""
    from torchvision.models import DenseNet  # which takes long, and is not always wanted

    return DenseNet(8, (3, 3), num_init_features=16, bn_size=2, num_classes=5)
