"""Blocks and networks to optimize, and what is fused in them."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sbf_dist import models
from sbf_dist.export.fused import FusedConv2d, FusedSBFConv2d
from sbf_dist.layers import SBFConv2d

ACTIVATIONS = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
}


def random_sbf_layer(conv: nn.Conv2d, slots: int = 2) -> SBFConv2d:
    """An SBF layer of half the filters of `conv`, wired at random."""
    channels = conv.out_channels
    kept = sorted(torch.randperm(channels)[: channels // 2].tolist())
    picks = [torch.randperm(len(kept))[:slots].tolist() for _ in range(channels - len(kept))]
    layer = SBFConv2d.from_conv(conv, kept, [[kept[i] for i in row] for row in picks])
    with torch.no_grad():
        layer.transforms.add_(0.1 * torch.randn_like(layer.transforms))
    return layer


def with_random_sbf_layers(name: str, image: int) -> nn.Module:
    """A network by name, every second convolution an SBF layer, norms as after training."""
    torch.manual_seed(0)
    model = models.build(name, 10)
    convolutions = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Conv2d and module.groups == 1 and module.out_channels >= 8
    ]
    for name_of_layer, conv in convolutions[1::2]:
        model.set_submodule(name_of_layer, random_sbf_layer(conv), strict=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(16, 3, image, image))
    return model.eval()


def check_agreement(optimized: nn.Module, model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        expected = model(x)
        found = optimized(x)
    bound = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=bound)


def kinds(model: nn.Module) -> Counter:
    return Counter(type(module) for module in model.modules())


class Block(nn.Module):
    """activation(conv(x) + shortcut(x)), written in a given way."""

    def __init__(self, sbf: bool, after: Callable, add: Callable, **settings) -> None:
        super().__init__()
        torch.manual_seed(0)
        settings = {"kernel_size": 3, "padding": 1} | settings
        self.conv: nn.Module = nn.Conv2d(4, 8, **settings)
        if sbf:
            self.conv = random_sbf_layer(self.conv)
        self.shortcut = nn.Conv2d(4, 8, 1, stride=settings.get("stride", 1))
        self.add = add
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.after(self.add(y, self.shortcut(x)))


def fused(optimized: nn.Module, name: str = "conv") -> FusedConv2d | FusedSBFConv2d:
    layer = optimized.get_submodule(name)
    assert isinstance(layer, FusedConv2d | FusedSBFConv2d)
    return layer


def operators(optimized: nn.Module) -> int:
    return sum(node.op.startswith("call") for node in optimized.graph.nodes)
