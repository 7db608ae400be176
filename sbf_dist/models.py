"""Students and teachers by name: our CIFAR networks, timm's and torchvision's."""

import difflib
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from sbf_dist.errors import UserError

CIFAR_NAME = re.compile(r"cifar_resnet(?P<depth>\d+)(?:_w(?P<width>\d+))?")
EXAMPLES = "cifar_resnet20, cifar_resnet14_w32, timm:resnet50, torchvision:resnet18"


def build(name: str, classes: int) -> nn.Module:
    """Build a randomly initialised network with `classes` outputs.

    `cifar_resnetD[_wW]` is He et al.'s ResNet for small images (arXiv 1512.03385, section 4.2) of
    depth D = 6n + 2 and W channels (16 if not given) in the first stage; `timm:NAME` and
    `torchvision:NAME` are those libraries' networks. Raises UserError for an unknown name.
    """
    library, _, rest = name.rpartition(":")
    if library == "timm":
        return _timm(rest, classes)
    if library == "torchvision":
        return _torchvision(rest, classes)
    match = CIFAR_NAME.fullmatch(name)
    if match is None:
        raise UserError(f"model {name!r} is unknown; names look like {EXAMPLES}")
    depth, width = int(match["depth"]), int(match["width"] or 16)
    if depth < 8 or (depth - 2) % 6:
        raise UserError(f"model {name!r}: the depth must be 6n + 2 (8, 14, 20, 26, …)")
    if width < 1:
        raise UserError(f"model {name!r}: the width must be at least 1")
    return CifarResNet((depth - 2) // 6, width, classes)


def _timm(name: str, classes: int) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise UserError(f"model 'timm:{name}' is unknown{_nearest(name, timm.list_models())}")
    return timm.create_model(name, num_classes=classes)


def _torchvision(name: str, classes: int) -> nn.Module:
    import torchvision
    from torchvision.models import get_model, list_models

    known = list_models(module=torchvision.models)  # classification only
    if name not in known:
        raise UserError(f"model 'torchvision:{name}' is unknown{_nearest(name, known)}")
    return get_model(name, weights=None, num_classes=classes)


def _nearest(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


class CifarResNet(nn.Module):
    """ResNet for images of about 32 px: three stages of `blocks` basic blocks.

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
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

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


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state dict of `model` as safetensors, in one step."""
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file(state, partial)
    partial.replace(path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into `model`; UserError naming the first key that does not fit."""
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise UserError(f"weights {path} do not exist") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights {path} are not a safetensors file: {error}") from None
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in state:
            raise UserError(f"weights {path} lack {name}, which the model has")
        if state[name].shape != tensor.shape:
            raise UserError(
                f"weights {path}: {name} is {tuple(state[name].shape)}, the model wants "
                f"{tuple(tensor.shape)}"
            )
    for name in state:
        if name not in own:
            raise UserError(f"weights {path} have {name}, which the model does not know")
    model.load_state_dict(state)
