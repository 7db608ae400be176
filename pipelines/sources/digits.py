"""scikit-learn's handwritten digits as JPEG files: a real data set that needs no download."""

import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.splits import share_out
from sbf_dist.errors import UserError

NUM_CLASSES = 10
NUM_TRAIN = 1297
NUM_VALIDATION = 500
_SIDE_PIXELS = 32
_MAX_LEVEL = 16  # the digits' grey values are 0..16
_QUALITY = 95
_KEY = 20211012  # of the split: the same for everyone
_FILE_NAME = re.compile(r"(train|val)/\d/\d{4}\.jpg")


def write(root: Path) -> None:
    """Write the 1,797 digits to root/train/<digit>/ (1,297) and root/val/<digit>/ (500).

    8×8 grey images, enlarged to 32×32 (bicubic) and saved as RGB JPEG with three equal channels;
    the split is in proportion to the classes and always the same. All files come in one rename: a
    kill leaves nothing half written. Nothing is done if all files are there; missing ones are put
    back. UserError if root holds anything else (UCI "Optical Recognition of Handwritten Digits",
    Alpaydin and Kaynak 1998).
    """
    root = Path(root)
    present = _present(root)
    if len(present) == NUM_TRAIN + NUM_VALIDATION and all(map(_FILE_NAME.fullmatch, present)):
        return
    from sklearn.datasets import load_digits

    digits = load_digits()
    names = _names(digits.target)
    foreign = sorted(present.difference(names))
    if foreign:
        raise UserError(f"digits {root}: holds other files ({foreign[0]}); choose a new folder")
    missing = [number for number, name in enumerate(names) if name not in present]
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        for number in missing:
            path = temporary / names[number]
            path.parent.mkdir(parents=True, exist_ok=True)
            _picture(digits.images[number]).save(path, "JPEG", quality=_QUALITY)
        if len(missing) == len(names) and not root.exists():
            temporary.chmod(0o755)
            temporary.rename(root)
            return
        for number in missing:
            (root / names[number]).parent.mkdir(parents=True, exist_ok=True)
            (temporary / names[number]).replace(root / names[number])
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _names(target: np.ndarray) -> list[str]:
    """The relative file name of each digit; the split is drawn class by class."""
    counts = np.bincount(target, minlength=NUM_CLASSES)
    generator = np.random.Generator(np.random.Philox(key=_KEY))
    held_out: set[int] = set()
    for digit, share in enumerate(share_out(counts, NUM_VALIDATION, counts)):
        held_out.update(generator.permutation(np.flatnonzero(target == digit))[:share].tolist())
    return [
        f"{'val' if number in held_out else 'train'}/{digit}/{number:04}.jpg"
        for number, digit in enumerate(target)
    ]


def _present(root: Path) -> set[str]:
    if not root.exists():
        return set()
    if not root.is_dir():
        raise UserError(f"digits {root}: is a file; choose a new folder")
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir()}


def _picture(image: np.ndarray) -> Image.Image:
    grey = Image.fromarray(np.round(image * (255 / _MAX_LEVEL)).astype(np.uint8))
    return grey.resize((_SIDE_PIXELS, _SIDE_PIXELS), Image.Resampling.BICUBIC).convert("RGB")
