"""Small networks of two kinds, as a comparison has them: with and without shortcuts."""

import torch
from torch import nn

from sbf_dist import models
from sbf_dist.compression.fitting.statistics import measure_batch_norm


def images(count: int = 48, size: int = 16) -> torch.Tensor:
    raw = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return raw + nn.functional.avg_pool2d(raw, 3, 1, 1)


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for out in (12, 16, 24):
        layers += [
            nn.Conv2d(channels, out, 3, padding=1),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def network(kind: str) -> nn.Module:
    """A network in eval mode whose batch norms know `images`."""
    torch.manual_seed(0)
    model = models.build("cifar_resnet8_w12", 5) if kind == "resnet" else vgg()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.4)
    measure_batch_norm(model, images(), 48)
    return model
