"""Our networks for images of about 32 px: the ResNets and VGGs of published results on CIFAR."""

import re

import torch
from torch import nn
from torch.nn import functional as F

from sbf_dist.errors import UserError

NAME = re.compile(r"cifar_(?P<family>resnet|vgg)(?P<depth>\d+)(?:_w(?P<width>\d+))?")
MAX_DEPTH = 1202  # the deepest of the paper
MAX_WIDTH = 512
# Width of each convolution in multiples of the first one's; 0 is a 2 x 2 max pooling.
VGG = {
    11: (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8),
    13: (1, 1, 0, 2, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8),
    16: (1, 1, 0, 2, 2, 0, 4, 4, 4, 0, 8, 8, 8, 0, 8, 8, 8),
    19: (1, 1, 0, 2, 2, 0, 4, 4, 4, 4, 0, 8, 8, 8, 8, 0, 8, 8, 8, 8),
}


def build_cifar(name: str, classes: int) -> nn.Module | None:
    """Build `cifar_resnetD[_wW]` or `cifar_vggD[_wW]`; None if the name is neither.

    A ResNet has depth D = 6n + 2 and W channels (16) in the first stage, a VGG depth 11, 13, 16 or
    19 and W channels (64) in its first convolution. Raises UserError for another depth or
    width, or one above MAX_DEPTH or MAX_WIDTH.
    """
    match = NAME.fullmatch(name)
    if match is None:
        return None
    is_vgg = match["family"] == "vgg"
    # Of many digits Python reads no number.
    depth = int(match["depth"][:9])
    width = int((match["width"] or ("64" if is_vgg else "16"))[:9])
    if not 1 <= width <= MAX_WIDTH:
        raise UserError(f"model {name[:60]!r}: the width must be from 1 to {MAX_WIDTH}")
    if is_vgg:
        if depth not in VGG:
            raise UserError(f"model {name!r}: the depth must be one of {', '.join(map(str, VGG))}")
        return CifarVGG(VGG[depth], width, classes)
    if not 8 <= depth <= MAX_DEPTH or (depth - 2) % 6:
        raise UserError(
            f"model {name[:60]!r}: the depth must be 6n + 2 (8, 14, 20, 26, … {MAX_DEPTH})"
        )
    return CifarResNet((depth - 2) // 6, width, classes)


def cifar_name(model: "CifarResNet | CifarVGG") -> str | None:
    """Return the name of the network of this depth and width; None if there is no such network."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1]
    is_vgg, width = isinstance(model, CifarVGG), convolutions[0].out_channels
    depth = len(convolutions) + (3 if is_vgg else 1)
    if depth not in VGG if is_vgg else (depth < 8 or (depth - 2) % 6):
        return None
    family, usual = ("vgg", 64) if is_vgg else ("resnet", 16)
    return f"cifar_{family}{depth}" + ("" if width == usual else f"_w{width}")


class CifarResNet(nn.Module):
    """ResNet for images of about 32 px: three stages of `blocks` basic blocks.

    He et al., arXiv 1512.03385, section 4.2, with `width` channels in the first stage.
    Shortcuts that change the shape are a 1 x 1 convolution (option B of the paper).
    """

    def __init__(self, blocks: int, width: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        stages = []
        channels = width
        for stage in range(3):
            out = width * 2**stage
            stages.append(
                nn.Sequential(
                    BasicBlock(channels, out, stride=1 if stage == 0 else 2),
                    *(BasicBlock(out, out) for _ in range(blocks - 1)),
                )
            )
            channels = out
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)
        _initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, 3, H, W) to logits (N, classes)."""
        x = F.relu(self.norm(self.conv(x)))
        return self.head(self.stages(x).mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, channels, H, W) to (N, out, H / stride, W / stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class CifarVGG(nn.Module):
    """VGG with batch norm for images of about 32 px, with one linear classifier.

    Simonyan and Zisserman's convolutions (arXiv 1409.1556, table 1; D is VGG-16) without the last
    pooling and the two wide linear layers, as the literature on pruning has it since Li et al.
    (arXiv 1608.08710): VGG-16 has 14.7 M parameters and 313 M multiply-adds at 32 px. `multiples`
    is a row of VGG. The convolutions have no bias, since batch norm follows.
    """

    def __init__(self, multiples: tuple[int, ...], width: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for multiple in multiples:
            if multiple == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            out = multiple * width
            layers += [
                nn.Conv2d(channels, out, 3, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
            ]
            channels = out
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)
        _initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, 3, H, W), of 16 px at least, to logits (N, classes)."""
        return self.head(self.features(x).mean((2, 3)))


def _initialise(model: nn.Module) -> None:
    """Draw the convolutions' weights as He et al. do for ReLU (arXiv 1502.01852)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
