"""Collects pictures of Debian packages for benchmarks/fidelity.py --more.

    mkdir F && cd F
    apt-get download gcompris-qt-data plasma-workspace-wallpapers lxqt-themes
    for package in *.deb; do dpkg -x $package packages; done
    python benchmarks/more_photographs.py packages more

Resource files of Qt (.rcc), which GCompris keeps its pictures in, are searched for WebP and JPEG
files. Of what is found, pictures of at least 300 px and of many colours are kept, as photographs
have them: drawings drop out. Each is written as JPEG of at most 1,600 px.
"""

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

LEAST_SIDE, MOST_SIDE = 300, 1600  # pixels
# Of the 16,384 pixels of a picture made small; drawings have a few thousand.
LEAST_COLOURS, SMALL = 6000, (128, 128)


def embedded(data: bytes) -> Iterator[bytes]:
    """Yield what begins like a WebP or a JPEG file; of a JPEG all that follows."""
    start = data.find(b"RIFF")
    while start >= 0:
        if data[start + 8 : start + 12] == b"WEBP":
            size = int.from_bytes(data[start + 4 : start + 8], "little")
            yield data[start : start + 8 + size]
        start = data.find(b"RIFF", start + 4)
    start = data.find(b"\xff\xd8\xff")
    while start >= 0:
        yield data[start : start + 3_000_000]
        start = data.find(b"\xff\xd8\xff", start + 3)


def candidates(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of pictures below a folder of unpacked packages."""
    for path in sorted(folder.rglob("gcompris-qt/**/*.rcc")):
        for content in embedded(path.read_bytes()):
            yield path.stem, content
    for images in sorted(folder.rglob("wallpapers/*/contents/images")):
        sizes = sorted(images.iterdir(), key=lambda path: path.stat().st_size)
        yield images.parent.parent.name, sizes[len(sizes) // 2].read_bytes()
    for path in sorted(folder.rglob("lxqt/wallpapers/*")):
        if path.suffix in (".jpg", ".jpeg", ".png"):
            yield path.stem, path.read_bytes()


def photograph(content: bytes) -> Image.Image | None:
    """Decode a picture; None if it is none, is small, or has few colours."""
    try:
        picture = Image.open(io.BytesIO(content))
        picture.load()
    except (OSError, SyntaxError):  # Pillow raises SyntaxError for broken PNG files
        return None
    if picture.mode != "RGB" or min(picture.size) < LEAST_SIDE:
        return None
    colours = picture.resize(SMALL).getcolors(SMALL[0] * SMALL[1])
    if colours is None or len(colours) < LEAST_COLOURS:
        return None
    picture.thumbnail((MOST_SIDE, MOST_SIDE))
    return picture


def main() -> None:
    """Write the pictures, and print how many there are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    count = 0
    for name, content in candidates(options.packages):
        picture = photograph(content)
        if picture is not None:
            picture.save(options.out / f"{name}-{count}.jpg", quality=92)
            count += 1
    print(f"{count} pictures in {options.out}")


if __name__ == "__main__":
    main()
