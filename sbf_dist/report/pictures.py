"""Filters, transformations, feature maps and photographs as small pictures within a page."""

import base64
import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_POSITIVE, _NEGATIVE = (222, 105, 16), (36, 120, 214)  # seen on white and on black
_MOST_INPUTS = 16  # of a filter, that are drawn
_MOST_PIXELS = 72  # of the side of a feature map


def of_filter(weights: NDArray[np.float32], inputs: NDArray[np.int64], most: float) -> str:
    """Draw a filter (inputs, k, k) as a square of k x k tiles, one for each of some inputs.

    Orange is positive, blue negative, transparent zero; `most` is the largest absolute value.
    """
    tiles = weights[inputs]
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    height, width = tiles.shape[1:]
    sheet = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1), np.float32)
    for number, tile in enumerate(tiles):
        top, left = number // columns * (height + 1), number % columns * (width + 1)
        sheet[top : top + height, left : left + width] = tile
    return _address(_signed(sheet, most))


def of_kernel(kernel: NDArray[np.float32], most: float) -> str:
    """Draw a transformation (m, m) in the colours of filters."""
    return _address(_signed(kernel, most))


def of_map(values: NDArray[np.float32], low: float, high: float) -> str:
    """Draw a feature map (H, W) from dark (`low`) to bright (`high`)."""
    import matplotlib

    scaled = (values - low) / max(high - low, 1e-12)
    image = Image.fromarray(matplotlib.colormaps["viridis"](scaled.clip(0, 1), bytes=True))
    image = image.convert("RGB")
    image.thumbnail((_MOST_PIXELS, _MOST_PIXELS), Image.Resampling.BOX)
    return _address(image)


def of_photo(pixels: NDArray[np.uint8], most: int = 160) -> str:
    """Encode a picture (H, W, 3), `most` pixels long at most."""
    image = Image.fromarray(pixels)
    image.thumbnail((most, most))
    return _address(image, "PNG" if max(image.size) <= 64 else "JPEG")


def strongest_inputs(filters: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the inputs with the largest weights in filters (n, inputs, k, k), ascending."""
    norms = np.square(filters).sum((0, 2, 3))
    return np.sort(np.argsort(-norms, kind="stable")[:_MOST_INPUTS])


def _signed(values: NDArray[np.float32], most: float) -> Image.Image:
    strength = np.abs(values) / max(most, 1e-12)
    rgba = np.empty((*values.shape, 4), np.uint8)
    rgba[..., :3] = np.where((values >= 0)[..., None], _POSITIVE, _NEGATIVE)
    rgba[..., 3] = (255 * strength.clip(0, 1) ** 0.75).round()
    return Image.fromarray(rgba)


def _address(image: Image.Image, kind: str = "PNG") -> str:
    """Return the picture as a data: address."""
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
