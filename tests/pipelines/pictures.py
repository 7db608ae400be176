"""Pictures whose pixels tell which file they came from, and pictures to be looked at closely."""

from pathlib import Path

import numpy as np
from PIL import Image


def colour_of(number: int) -> tuple[int, int, int]:
    """One colour a file, far enough apart to be distinguished after resizing."""
    return (10 * (number % 25), 100 * (number // 25), 255 - 10 * (number % 25))


def write_plain(path: Path, number: int, size: tuple[int, int] = (20, 15)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour_of(number)).save(path)


def smooth_picture(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (9 + 4 * c)) + np.cos(y / (13 - 3 * c)) for c in range(3)]
    return Image.fromarray((127 + 60 * np.stack(waves, -1)).astype(np.uint8))
