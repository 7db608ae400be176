"""Which image files DALI will decode, found without DALI and at a fraction of a full decode."""

import io
import stat
import struct
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import sched_getaffinity
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip
_FORMATS = {"JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM"}
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B"}
# The TIFF compressions that nvImageCodec's libtiff is built with, by Pillow's names.
_TIFF_COMPRESSIONS = {
    "raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "jpeg", "tiff_jpeg",
    "group3", "group4", "tiff_ccitt", "zstd",
}  # fmt: skip
_BITS_PER_SAMPLE = 258
_ORIENTATION = 274
# Decoded, one such image takes 192 MB in each thread that works on it.
MAX_PIXELS = 64_000_000
_TOO_LARGE = f"more than the limit of {MAX_PIXELS // 1_000_000} million pixels"
_PNG_END = b"IEND\xaeB`\x82"
_CHUNK_IMAGES = 64


@dataclass(frozen=True)
class Inspection:
    """What one file holds.

    `height` and `width` are those of the upright picture (after EXIF rotation), in pixels; `bytes`
    is the size of the file; `fault` is None, or one line saying why the file cannot be used (the
    other fields are then 0).
    """

    height: int
    width: int
    bytes: int
    fault: str | None = None


def inspect_image(path: Path) -> Inspection:
    """Read one image to its end and say its size, or why it cannot be decoded.

    JPEG is decoded at 1/8 scale: the whole entropy stream is read, so that every truncation shows,
    while most of the inverse transform and of the colour conversion is saved. Damage that leaves
    the stream decodable (flipped bits in a JPEG) passes here as it does in DALI. An image of more
    than MAX_PIXELS pixels is a fault, found in its header: nothing of it is decoded. Never raises
    for the content of a file.
    """
    try:
        # Opening a pipe would wait for somebody to write to it.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            return Inspection(0, 0, 0, fault="not a regular file")
        with Path(path).open("rb") as file:
            return _inspected(file)
    except OSError as error:
        return Inspection(0, 0, 0, fault=f"not a readable image ({error.strerror})")


def inspect_bytes(data: bytes) -> Inspection:
    """What inspect_image says of a file with this content."""
    return _inspected(io.BytesIO(data))


def _inspected(file: BinaryIO) -> Inspection:
    try:
        with Image.open(file) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                return Inspection(0, 0, 0, fault=f"{width} x {height}, {_TOO_LARGE}")
            if image.format == "JPEG":
                image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
            orientation = image.getexif().get(_ORIENTATION, 1)
            fault = _unsupported(image)
            if fault is None:
                image.load()
                fault = _incomplete(file, image.format)
        size = file.seek(0, io.SEEK_END)
    except Image.DecompressionBombError:
        return Inspection(0, 0, 0, fault=_TOO_LARGE)
    except UnidentifiedImageError:  # its message names an object of Python's
        return Inspection(0, 0, 0, fault="not a readable image (unknown format)")
    except Exception as error:  # Pillow raises whatever its parsers stumble over
        return Inspection(0, 0, 0, fault=f"not a readable image ({error})")
    if fault is not None:
        return Inspection(0, 0, 0, fault=fault)
    if orientation in (5, 6, 7, 8):
        width, height = height, width
    return Inspection(height, width, size)


def inspect_all(
    paths: Sequence[Path], progress: Callable[[int, int], None] | None = None
) -> list[Inspection]:
    """Inspect many files, in the order given; `progress(done, total)` is called now and then.

    Threads, not processes: Pillow decodes without the interpreter's lock, and a process pool was
    slower by 15 % on two cores.
    """
    chunks = [paths[i : i + _CHUNK_IMAGES] for i in range(0, len(paths), _CHUNK_IMAGES)]
    found: list[Inspection] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(2 * len(sched_getaffinity(0))) as pool:
        # Pillow warns of large images, of which we have a limit of our own.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for part in pool.map(lambda chunk: [inspect_image(path) for path in chunk], chunks):
            found += part
            if progress is not None:
                progress(len(found), len(paths))
    return found


def _unsupported(image: Image.Image) -> str | None:
    if image.format not in _FORMATS:
        return f"{image.format} data, which is not decoded whatever the file's name"
    # Pillow calls a 16-bit PGM "I"; DALI maps no other 32-bit image to 0..255.
    if image.mode not in _MODES and not (image.format == "PPM" and image.mode == "I"):
        return f"{image.format} of mode {image.mode}, which is not decoded"
    if image.format == "TIFF":
        compression = image.info.get("compression", "raw")
        if compression not in _TIFF_COMPRESSIONS:
            return f"TIFF with {compression} compression, which is not decoded"
        if _BITS_PER_SAMPLE not in getattr(image, "tag_v2", {}):
            return "TIFF without the field BitsPerSample, which is not decoded"
    return None


def _incomplete(file: BinaryIO, image_format: str | None) -> str | None:
    """The faults that Pillow forgives and DALI does not."""
    if image_format not in ("PNG", "WEBP"):
        return None
    file.seek(0)
    data = file.read()
    if image_format == "PNG" and _PNG_END not in data:
        return "not a readable image (truncated PNG)"
    if image_format == "WEBP" and not _webp_chunks_aligned(data):
        return "WebP whose EXIF block stands behind a block of odd size, which is not decoded"
    return None


def _webp_chunks_aligned(data: bytes) -> bool:
    """False where nvImageCodec 0.9 loses its way: it forgets the padding of odd RIFF blocks.

    It walks the blocks only to find EXIF, so an odd block matters only in front of that.
    """
    at, odd = 12, False
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        if name == b"EXIF":
            return not odd
        odd = odd or size % 2 == 1
        at += 8 + size + size % 2
    return True
