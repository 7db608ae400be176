from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.sources import photos
from pipelines.sources.folder import index_folder
from sbf_dist.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos") / "data"
    photos.write(root)
    return root


@pytest.fixture(scope="module")
def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.jpg")}


def test_every_photograph_gives_as_many_patches_in_colour(root, contents):
    found = Counter(tuple(name.split("/")[:2]) for name in contents)
    assert set(found) == {(part, p) for part in ("train", "val") for p in photos.PHOTOGRAPHS}
    assert {found["train", p] for p in photos.PHOTOGRAPHS} == {photos.NUM_TRAIN}
    assert {found["val", p] for p in photos.PHOTOGRAPHS} == {photos.NUM_VALIDATION}
    for name in list(contents)[::97]:
        with Image.open(root / name) as picture:
            assert (picture.size, picture.mode) == ((photos.SIDE_PIXELS, photos.SIDE_PIXELS), "RGB")


@pytest.mark.parametrize("photograph", photos.PHOTOGRAPHS)
def test_no_pixel_is_in_training_and_in_validation_nor_next_to_both(photograph):
    pixels = photos.read(photograph)
    used = {"train": np.zeros(pixels.shape[:2], bool), "val": np.zeros(pixels.shape[:2], bool)}
    for part, found in photos.windows(photograph, pixels).items():
        for window in found:
            assert min(window.top, window.left) >= 0
            assert window.of(pixels).shape == (window.side, window.side, 3)
            assert window.side >= photos.SIDE_PIXELS
            used[part][window.top : window.top + window.side][
                :, window.left : window.left + window.side
            ] = True
    assert not (used["train"] & used["val"]).any()
    # Nor within the gap: widen one part by it, in both directions.
    near = used["train"].copy()
    for axis in (0, 1):
        for shift in range(1, photos.GAP_PIXELS):
            near |= np.roll(used["train"], shift, axis) | np.roll(used["train"], -shift, axis)
    assert not (near & used["val"]).any()


def test_the_patches_of_a_photograph_have_similar_brightness_and_contrast(root, contents):
    level, spread = [], []
    for photograph in photos.PHOTOGRAPHS:
        names = [n for n in contents if n.startswith(f"train/{photograph}/")]
        grey = np.stack([np.asarray(Image.open(root / n).convert("L"), float) for n in names])
        level.append(grey.mean())
        spread.append(grey.std((1, 2)).mean())
    assert max(level) - min(level) < 15
    assert max(spread) - min(spread) < 12


def test_writing_again_touches_nothing_and_writing_elsewhere_gives_the_same(
    root, contents, tmp_path
):
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.jpg")}
    photos.write(root)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*.jpg")} == before
    photos.write(tmp_path / "other")
    other = tmp_path / "other"
    assert {p.relative_to(other).as_posix(): p.read_bytes() for p in other.rglob("*.jpg")} == (
        contents
    )
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_missing_files_are_put_back(root, contents):
    for name in list(contents)[::100]:
        (root / name).unlink()
    photos.write(root)
    assert {n: (root / n).read_bytes() for n in list(contents)[::100]} == {
        n: contents[n] for n in list(contents)[::100]
    }
    assert [p.name for p in root.parent.iterdir()] == [root.name]


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"photos .*: holds other files \(thesis.txt\)"):
        photos.write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; choose a new folder"):
        photos.write(tmp_path / "file")


def test_a_photograph_that_was_not_installed_is_named_with_its_library(monkeypatch):
    monkeypatch.setitem(photos.PHOTOGRAPHS, "cat", ("skimage.data", "tiger.png"))
    with pytest.raises(UserError, match=r"tiger.png is not in the installed scikit-image"):
        photos.read("cat")


def test_the_folder_source_reads_them(root):
    index = index_folder(root, labelled_per_class=80, validation=None, seed=0)
    assert index.classes == sorted(photos.PHOTOGRAPHS)
    assert {part: len(ids) for part, ids in index.parts.items()} == {
        "labelled": 800,
        "unlabelled": 800,
        "validation": 600,
    }
    assert index.skipped == []
