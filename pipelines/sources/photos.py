"""Patches of ten photographs as JPEG files: a real data set in colour that needs no download."""

import hashlib
import re
import shutil
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sbf_dist.errors import UserError

SIDE_PIXELS = 32
NUM_TRAIN = 160  # patches of each photograph
NUM_VALIDATION = 60
BLOCK_PIXELS = 80  # a photograph is cut into squares of so many pixels …
GAP_PIXELS = 8  # … with so many unused between any two: more than a block of JPEG's
# Where the wheels of scikit-image and scikit-learn keep them.
PHOTOGRAPHS = {
    "astronaut": ("skimage.data", "astronaut.png"),
    "cat": ("skimage.data", "chelsea.png"),
    "coffee": ("skimage.data", "coffee.png"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
    "galaxies": ("skimage.data", "hubble_deep_field.jpg"),
    "motorcycle": ("skimage.data", "motorcycle_left.png"),
    "pagoda": ("sklearn.datasets.images", "china.jpg"),
    "retina": ("skimage.data", "retina.jpg"),
    "rocket": ("skimage.data", "rocket.jpg"),
    "tissue": ("skimage.data", "ihc.png"),
}
_MAX_WINDOW_PIXELS = BLOCK_PIXELS - GAP_PIXELS  # side of a window
_MIN_CONTRAST = 16.0  # standard deviation of the grey values of a window that shows something
_BRIGHTNESS = (100.0, 150.0)  # mean grey value of a patch
_CONTRAST = (30.0, 50.0)  # standard deviation of its grey values
_SATURATION = (0.5, 1.0)  # of its colours, as a share of the photograph's
_QUALITY = 92
_KEY = 20211012  # of everything random here: the same for everyone
_FILE_NAME = re.compile(rf"(train|val)/({'|'.join(PHOTOGRAPHS)})/\d{{3}}\.jpg")


@dataclass(frozen=True)
class Window:
    """The square of a photograph that becomes a patch, in its pixels."""

    top: int
    left: int
    side: int

    def of(self, photograph: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Cut the window out of (H, W, 3)."""
        return photograph[self.top : self.top + self.side, self.left : self.left + self.side]


def write(root: Path) -> None:
    """Write 1,600 patches to root/train/<photograph>/ and 600 to root/val/<photograph>/.

    A patch is a square of 32 to 72 pixels of its photograph (the class), resized to 32 × 32, turned
    by a multiple of 90° and mirrored; its brightness and contrast are drawn anew, its colours are
    faded by a random share, so that texture and shape alone give the class. Squares of train
    and val come from different blocks of the photograph, GAP_PIXELS apart: no pixel is in both.
    All files come in one rename: a kill leaves nothing half written. Nothing is done if all files
    are there; missing ones are put back. UserError if root holds anything else.
    """
    root = Path(root)
    names = _names()
    present = _present(root)
    foreign = sorted(present.difference(names))
    if foreign:
        raise UserError(f"photos {root}: holds other files ({foreign[0]}); choose a new folder")
    missing = [name for name in names if name not in present]
    if not missing:
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        for photograph in PHOTOGRAPHS:
            for name, patch in _patches(photograph).items():
                if name not in present:
                    path = temporary / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    patch.save(path, "JPEG", quality=_QUALITY)
        if not present and not root.exists():
            temporary.chmod(0o755)
            temporary.rename(root)
            return
        for name in missing:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).replace(root / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read(photograph: str) -> NDArray[np.uint8]:
    """Read a photograph, (H, W, 3), from the package that has it. UserError if it has not."""
    package, name = PHOTOGRAPHS[photograph]
    try:
        with (files(package) / name).open("rb") as file, Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (ModuleNotFoundError, FileNotFoundError):
        library = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package.split(".")[0]]
        raise UserError(
            f"photos: {name} is not in the installed {library}; install {library} from a wheel"
        ) from None


def windows(photograph: str, pixels: NDArray[np.uint8]) -> dict[str, list[Window]]:
    """Draw the windows of the parts "train" and "val", without those that show next to nothing.

    A window lies in one block. Every third block, along the diagonals, is for val.
    """
    generator = _generator(photograph, "windows")
    rows, columns = (length // BLOCK_PIXELS for length in pixels.shape[:2])
    blocks: dict[str, list[tuple[int, int]]] = {"train": [], "val": []}
    for row in range(rows):
        for column in range(columns):
            part = "val" if (row + column) % 3 == 0 else "train"
            blocks[part].append(
                (row * BLOCK_PIXELS + GAP_PIXELS // 2, column * BLOCK_PIXELS + GAP_PIXELS // 2)
            )
    found: dict[str, list[Window]] = {"train": [], "val": []}
    for part, wanted in (("train", NUM_TRAIN), ("val", NUM_VALIDATION)):
        while len(found[part]) < wanted:
            top, left = blocks[part][generator.integers(len(blocks[part]))]
            side = int(generator.integers(SIDE_PIXELS, _MAX_WINDOW_PIXELS + 1))
            down, right = generator.integers(0, _MAX_WINDOW_PIXELS - side + 1, size=2)
            window = Window(top + int(down), left + int(right), side)
            if _grey(window.of(pixels).astype(float)).std() >= _MIN_CONTRAST:
                found[part].append(window)
    return found


def _names() -> list[str]:
    counts = {"train": NUM_TRAIN, "val": NUM_VALIDATION}
    return [
        f"{part}/{photograph}/{number:03}.jpg"
        for part, count in counts.items()
        for photograph in PHOTOGRAPHS
        for number in range(count)
    ]


def _present(root: Path) -> set[str]:
    if not root.exists():
        return set()
    if not root.is_dir():
        raise UserError(f"photos {root}: is a file; choose a new folder")
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir()}


def _patches(photograph: str) -> dict[str, Image.Image]:
    """The patches of a photograph, by the names of their files."""
    pixels = read(photograph)
    generator = _generator(photograph, "appearance")
    return {
        f"{part}/{photograph}/{number:03}.jpg": _patch(window.of(pixels), generator)
        for part, drawn in windows(photograph, pixels).items()
        for number, window in enumerate(drawn)
    }


def _patch(pixels: NDArray[np.uint8], generator: np.random.Generator) -> Image.Image:
    """Resize, turn, mirror, and draw brightness, contrast and saturation."""
    small = Image.fromarray(pixels).resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.LANCZOS)
    patch = np.rot90(np.asarray(small).astype(float), int(generator.integers(4)))
    if generator.integers(2):
        patch = patch[:, ::-1]
    grey = _grey(patch)
    colour = patch - grey[..., None]
    gain = generator.uniform(*_CONTRAST) / max(grey.std(), 1.0)
    grey = (grey - grey.mean()) * gain + generator.uniform(*_BRIGHTNESS)
    colour = colour * generator.uniform(*_SATURATION)
    mixed = grey[..., None] + colour
    return Image.fromarray(np.clip(np.round(mixed), 0, 255).astype(np.uint8))


def _grey(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Luma of (…, 3) after ITU-R BT.601."""
    return pixels @ np.array([0.299, 0.587, 0.114])


def _generator(photograph: str, purpose: str) -> np.random.Generator:
    """Random numbers of a photograph and purpose: another photograph changes nothing."""
    subkey = int.from_bytes(
        hashlib.sha256(f"{purpose} {photograph}".encode()).digest()[:8], "little"
    )
    return np.random.Generator(np.random.Philox(key=np.array([_KEY, subkey], dtype=np.uint64)))
