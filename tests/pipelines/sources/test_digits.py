from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.sources import digits
from pipelines.sources.folder import index_folder
from sbf_dist.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits") / "data"
    digits.write(root)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.jpg")}


def test_all_digits_are_written_in_the_promised_split(root):
    files = contents(root)
    assert Counter(name.split("/")[0] for name in files) == {"train": 1297, "val": 500}
    assert len({Path(name).name for name in files}) == 1797
    target = load_digits().target
    for name in files:
        assert int(name.split("/")[1]) == target[int(Path(name).stem)]


def test_the_split_is_in_proportion_to_the_classes(root):
    val = Counter(name.split("/")[1] for name in contents(root) if name.startswith("val"))
    counts = np.bincount(load_digits().target)
    for digit, count in enumerate(counts):
        assert abs(val[str(digit)] - count * 500 / 1797) < 1


def test_the_pictures_are_the_digits_enlarged(root):
    images = load_digits().images
    for name in list(contents(root))[::200]:
        with Image.open(root / name) as picture:
            assert picture.size == (32, 32)
            assert picture.mode == "RGB"
            red, green, blue = (np.asarray(c).astype(int) for c in picture.split())
            small = np.asarray(picture.convert("L").resize((8, 8), Image.Resampling.BOX))
        assert np.array_equal(red, green)
        assert np.array_equal(green, blue)
        original = images[int(Path(name).stem)] * 255 / 16
        assert np.corrcoef(small.ravel(), original.ravel())[0, 1] > 0.97


def test_writing_again_touches_nothing_and_writing_elsewhere_gives_the_same(root, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.jpg")}
    digits.write(root)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*.jpg")} == before
    digits.write(tmp_path / "other")
    assert contents(tmp_path / "other") == contents(root)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_missing_files_are_put_back(root):
    before = contents(root)
    for name in list(before)[::100]:
        (root / name).unlink()
    digits.write(root)
    assert contents(root) == before
    assert [p.name for p in root.parent.iterdir()] == [root.name]


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(thesis.txt\)"):
        digits.write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_folder_source_reads_them(root):
    index = index_folder(root, labelled_per_class=10, validation=None, seed=0)
    assert index.classes == [str(digit) for digit in range(10)]
    assert {part: len(ids) for part, ids in index.parts.items()} == {
        "labelled": 100,
        "unlabelled": 1197,
        "validation": 500,
    }
    assert index.skipped == []
