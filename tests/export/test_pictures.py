"""Pictures as the exported network sees them: as the evaluation prepares them, without DALI."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from launchers.images import evaluation_images
from pipelines.index import DataIndex
from pipelines.sources.folder import index_plain
from sbf_dist.export import sbf_student
from sbf_dist.export.onnx import export_onnx
from sbf_dist.export.sbf_student import Student, centre_crop
from sbf_dist.recipe import Data

SIZES = [(60, 91), (61, 60), (67, 100), (57, 91), (20, 20), (91, 57), (33, 77), (64, 211)]


def _textured(height: int, width: int) -> Image.Image:
    """A picture with detail in all places, smooth enough to be no question of rounding alone."""
    noise = np.random.default_rng(height * width).integers(0, 256, (12, 12, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for number, (height, width) in enumerate(SIZES):
        _textured(height, width).save(root / f"size-{number}.png")
    picture = _textured(80, 120)
    grey = picture.convert("L")
    turned = Image.Exif()
    turned[274] = 6  # orientation
    picture.save(root / "photo.jpg", quality=90)
    picture.save(root / "turned.jpg", exif=turned)
    picture.convert("CMYK").save(root / "cmyk.jpg")
    picture.convert("P").save(root / "palette.png")
    grey.save(root / "grey.jpg")
    grey.convert("1").save(root / "black-and-white.png")
    grey.convert("LA").save(root / "grey-alpha.png")
    transparent = np.array(picture.convert("RGBA"))
    transparent[:, :60, 3] = 0
    Image.fromarray(transparent).save(root / "alpha.png")
    Image.fromarray(np.array(grey).astype(np.uint16) * 257).save(root / "sixteen-bits.png")
    return root


@pytest.fixture(scope="module")
def index(folder: Path) -> DataIndex:
    return index_plain(folder)


@pytest.mark.parametrize(("side", "crop"), [(32, 0.875), (20, 1.0), (45, 0.9), (90, 0.875)])
def test_pixels_are_those_of_the_evaluation_within_one_level(
    folder: Path, index: DataIndex, side: int, crop: float
) -> None:
    data = Data(root=folder, image_size=side, crop=crop, mean=(0, 0, 0), std=(1, 1, 1))
    wanted = evaluation_images(data, index, np.arange(len(index))).permute(0, 2, 3, 1) * 255
    for name, pixels in zip(index.files, wanted.numpy(), strict=True):
        found = centre_crop(sbf_student._opened(folder / name), side, side, crop)
        assert found.dtype == np.uint8
        off = np.abs(found.astype(float) - pixels)
        assert off.max() < 1.01, f"{name}: {off.max()} at {np.argwhere(off > 1.01)[0]}"


def test_a_network_that_is_no_square_sees_the_centre() -> None:
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[10:30, 15:45] = 255
    found = centre_crop(Image.fromarray(picture), 8, 12, 1.0)
    assert found.shape == (8, 12, 3)
    assert found[4, 6].min() == 255
    assert found[0].max() == found[:, 0].max() == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", r"not a readable image \(unknown format\)"),
        (b"", r"not a readable image \(unknown format\)"),
        ("cut", r"not a readable image \(.*truncated.*\)"),
        ("large", "more than the limit of [0-9]+ million pixels"),
    ],
)
def test_a_picture_that_is_not_readable_is_said_in_one_line(
    content: bytes | str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(content, str):
        file = io.BytesIO()
        _textured(80, 120).save(file, "JPEG")
        content = file.getvalue()[:-400] if content == "cut" else file.getvalue()
    if "limit" in message:
        monkeypatch.setattr(sbf_student, "MAX_PIXELS", 80 * 120 - 1)
    with pytest.raises(ValueError, match=message) as error:
        sbf_student._opened(content)
    assert str(error.value).isprintable()


def test_a_place_without_a_file_is_said_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        sbf_student._opened(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="not a regular file"):
        sbf_student._opened(tmp_path)


def test_other_onnx_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    export_onnx(nn.Conv2d(3, 4, 3).eval(), path, input_shape=(3, 8, 8))
    with pytest.raises(ValueError, match=r"other\.onnx is not an exported student"):
        Student(path)
