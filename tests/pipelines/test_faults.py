"""Folders full of bad files, disks that are full, ranks that disagree."""

import io
import os
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from grouped_settings import grouped
from pictures import smooth_picture
from PIL import Image

from pipelines.index import DataIndex
from pipelines.inspection import MAX_PIXELS, inspect_image
from pipelines.loader import EvalLoader, TrainLoader
from pipelines.sources.folder import index_folder
from sbf_dist.errors import UserError
from sbf_dist.settings import Augmentation

COMMON = {
    "image_size": 16,
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "rank": 0,
    "world_size": 1,
    "threads": 2,
}


def encoded(image: Image.Image, kind: str, **arguments) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **arguments)
    return buffer.getvalue()


def huge_png(side: int) -> bytes:
    """A white picture of side × side pixels in some kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(
            ">I", zlib.crc32(name + data)
        )  # fmt: skip

    row = b"\0" + b"\xff" * (side // 8)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def huge_jpeg(side: int) -> bytes:
    """A small JPEG whose header says that it is side × side."""
    data = bytearray(encoded(Image.new("RGB", (64, 64)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(data)


def odd_files() -> tuple[dict[str, bytes], dict[str, tuple[bytes, str]]]:
    """What can be decoded in spite of its oddity, and what cannot, with the reason."""
    picture = smooth_picture(64, 48)
    exif = Image.Exif()
    exif[274] = 6
    palette = picture.convert("P")
    palette.info["transparency"] = 0
    deep = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    jpeg = encoded(picture, "JPEG")
    good = {
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(picture.convert("L"), "JPEG"),
        "turned.jpg": encoded(picture, "JPEG", exif=exif),
        "png_named.jpg": encoded(picture, "PNG"),
        "palette_alpha.png": encoded(palette, "PNG", transparency=0),
        "sixteen_bits.png": encoded(Image.fromarray(deep), "PNG"),
        "jpeg_named.png": jpeg,
    }
    bad = {
        "empty.jpg": (b"", "not a readable image"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "not a readable image"),
        "corrupt.png": (encoded(picture, "PNG")[:200] + b"\0" * 400, "not a readable image"),
        "text.jpg": (b"no picture at all", "not a readable image"),
        "gif_named.jpg": (encoded(picture, "GIF"), "GIF data"),
        "huge.png": (huge_png(20_000), "more than the limit of 64 million pixels"),
        "huge.jpg": (huge_jpeg(20_000), "more than the limit of 64 million pixels"),
        "large.jpg": (huge_jpeg(9_000), "9000 x 9000, more than the limit of 64 million pixels"),
    }
    return good, bad


@pytest.fixture(scope="module")
def odd_root(tmp_path_factory) -> Path:
    """Two classes: a thousand plain files, and in their midst the odd ones."""
    root = tmp_path_factory.mktemp("odd")
    plain = encoded(smooth_picture(40, 30), "JPEG")
    for k in range(1000):
        path = root / f"class{k % 2}" / f"{k:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(plain)
    good, bad = odd_files()
    for name, data in [*good.items(), *((name, data) for name, (data, _) in bad.items())]:
        (root / "class0" / name).write_bytes(data)
    return root


def test_a_folder_with_bad_files_is_read_and_they_are_named(odd_root):
    good, bad = odd_files()
    index = index_folder(odd_root, labelled_per_class=None, validation=100, seed=0)
    assert len(index) == 1000 + len(good)
    assert all(f"class0/{name}" in index.files for name in good)
    reasons = dict(line.split(": ", 1) for line in index.skipped)
    assert set(reasons) == {f"class0/{name}" for name in bad}
    for name, (_, reason) in bad.items():
        assert reason in reasons[f"class0/{name}"], reasons[f"class0/{name}"]
    loader = TrainLoader(
        index, ["labelled"], batch_size=64, augmentation=Augmentation(), seed=0, **grouped(**COMMON)
    )
    seen = np.concatenate([next(loader)["id"].numpy() for _ in range(1 + len(index) // 64)])
    assert set(seen) == set(index.parts["labelled"])
    evaluated = EvalLoader(index, "validation", batch_size=64, **grouped(**COMMON))
    assert sum(len(batch["id"]) for batch in evaluated) == 100


def test_a_huge_image_is_refused_by_its_header_and_takes_no_memory(tmp_path):
    code = f"""
import sys
from pathlib import Path
from tests.peak_memory import peak_resident
from pipelines.inspection import inspect_all
before = peak_resident()
found = inspect_all([Path(name) for name in sys.argv[1:]])
after = peak_resident()
limit = "more than the limit of {MAX_PIXELS // 1_000_000} million"
assert all(limit in it.fault for it in found), found
print(after - before)
"""
    paths = []
    for number, data in enumerate((huge_png(20_000), huge_jpeg(20_000), huge_png(12_000)) * 3):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(data)
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, paths)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < 50e6  # one of the nine takes 50 MB to 1.2 GB


def test_the_largest_image_that_is_allowed_is_decoded(tmp_path):
    side = 7992  # a multiple of 8 below the root of 64 million
    (tmp_path / "large.png").write_bytes(huge_png(side))
    found = inspect_image(tmp_path / "large.png")
    assert (found.height, found.width, found.fault) == (side, side, None)


# --- disks ---------------------------------------------------------------------------------------


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 100 bytes, as on a disk that is full; pytest's own log neither."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files_below(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_full_disk_is_reported_in_one_line_and_the_old_index_stays(
    plain_root, plain_index, tmp_path
):
    plain_index.save(tmp_path)
    before = files_below(tmp_path)
    other = index_folder(plain_root, labelled_per_class=1, validation=5, seed=4)
    message = r"^index .*: cannot be written \(File too large\); free"
    with small_files(), pytest.raises(UserError, match=message):
        other.save(tmp_path)
    assert files_below(tmp_path) == before
    assert DataIndex.load(tmp_path).digest == plain_index.digest


def test_a_read_only_folder_is_reported_in_one_line(plain_index, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:  # whom no mode keeps out
        tmp_path.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
            plain_index.save(folder / "index")
    finally:
        if root:
            os.seteuid(0)


def test_a_file_where_the_folder_should_be_is_reported(plain_index, tmp_path):
    (tmp_path / "index").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(File exists\)"):
        plain_index.save(tmp_path / "index")
