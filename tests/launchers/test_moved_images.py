"""Images that were moved, alone or with their run, are found again, and others are not taken."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launchers.display import Display
from launchers.images import find_again, index_images
from pipelines.index import DataIndex
from sbf_dist.errors import UserError
from sbf_dist.recipe import Data


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for number in range(8):
        path = root / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9 + number, 3), number, np.uint8)).save(path)
    return root


def indexed(data: Data, runs: Path) -> Path:
    folder = runs / "mine" / "data"
    index_images(data, runs, 0, Display()).save(folder)
    return folder


def test_a_moved_folder_of_images_is_found_by_the_recipe(tmp_path: Path, photos: Path) -> None:
    folder = indexed(Data(root=photos, validation=2), tmp_path / "runs")
    before = DataIndex.load(folder)
    photos.rename(tmp_path / "elsewhere")
    find_again(Data(root=tmp_path / "elsewhere", validation=2), tmp_path / "runs", folder, 0)
    after = DataIndex.load(folder)
    assert after.root == tmp_path / "elsewhere"
    assert after.digest == before.digest


def test_a_relative_root_is_found_from_another_folder_as_well(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = indexed(Data(root=Path("photos"), validation=2), tmp_path / "runs")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    find_again(Data(root=Path("photos"), validation=2), tmp_path / "runs", folder, 0)
    assert DataIndex.load(folder).root == photos
    find_again(Data(root=Path("../photos"), validation=2), tmp_path / "runs", folder, 0)
    assert DataIndex.load(folder).root.samefile(photos)


@pytest.mark.parametrize("change", ["missing", "another file"])
def test_other_images_are_not_taken_for_those_that_were_indexed(
    tmp_path: Path, photos: Path, change: str
) -> None:
    folder = indexed(Data(root=photos, validation=2), tmp_path / "runs")
    shutil.copytree(photos, tmp_path / "others")
    one = tmp_path / "others" / "cat" / "3.png"
    one.unlink()
    if change == "another file":
        one.write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        find_again(Data(root=tmp_path / "others", validation=2), tmp_path / "runs", folder, 0)
    assert f"others: cat/3.png is {change}; the images that were indexed were in" in str(
        caught.value
    )
    assert DataIndex.load(folder).root == photos


def test_a_moved_run_writes_its_embedded_images_anew(tmp_path: Path) -> None:
    data = Data(source="digits")
    indexed(data, tmp_path / "runs")
    (tmp_path / "new").mkdir()
    (tmp_path / "runs" / "mine").rename(tmp_path / "new" / "mine")
    shutil.rmtree(tmp_path / "runs")
    find_again(data, tmp_path / "new", tmp_path / "new" / "mine" / "data", 0)
    index = DataIndex.load(tmp_path / "new" / "mine" / "data")
    assert index.root == tmp_path / "new" / "data" / "digits"
    assert (index.root / index.files[0]).exists()
