"""Sets in an object store on the command line: prepared, checked, trained on, and refused."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from archive_makers import cifar10_python

from launchers.commands.compress import settings_of
from launchers.display import Display
from launchers.images import calibration_images, find_again, index_images
from launchers.run import execution
from pipelines.index import DataIndex
from sbf_dist.errors import UserError
from sbf_dist.object_storage import ObjectFolder
from sbf_dist.recipe import Data

RECIPE = """
name: tiny
data: {source: cifar10, root: ADDRESS, image_size: 16, augmentation: {crop: padded}}
teachers: [{name: one, model: cifar_resnet8_w4, training: {steps: 8, batch_size: 10}}]
compress: {teacher: one, macs: 0.5}
distill: {training: {steps: 10}}
"""
# Overrides that are refused, and what is said.
REFUSED = {
    "data.root=s3://no-such-bucket/x": "s3://no-such-bucket/x.*: the bucket does not exist",
    "data.root=s3://test-bucket/none": "s3://test-bucket/none: is empty; sbf data prepare",
    "data.root=s4://test-bucket/x": r"data.root: s4://test-bucket/x: s4:// is not known; s3:",
    "data.source=cifar100": r"data s3://.*: holds cifar10, not cifar100",
    "data.source=digits": r"root = 's3://.*' must be a folder for source: digits",
    "data.unlabelled=more": r"data.unlabelled /.*/more: is not a folder",
    "data.unlabelled=.": r"data.unlabelled .*: must lie where data.root does \(s3://",
    "data.cache_gb=0.0001": r"data.cache_gb = 0.0001 is less than the largest shard, 0.0",
    "data.cache_gb=0": "data.cache_gb = 0 must be greater than 0",
    "data.cache_dir=tiny.yaml": r"data.cache_dir .*/tiny.yaml: cannot be used \(Not a direc",
}
Sbf = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    cifar10_python(folder)
    return folder


@pytest.fixture
def address(sbf, archives, s3, tmp_path, monkeypatch) -> str:
    """A set that the command line has put into the bucket; the recipe lies in this folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SBF_DIST_CACHE", str(tmp_path / "caches"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = f"{s3.bucket}/sets/cifar10"
    code, _, err = sbf(*prepare(archives, found))
    assert code == 0, err
    Path("tiny.yaml").write_text(RECIPE.replace("ADDRESS", found))
    return found


def prepare(archives: Path, out: str | Path, *more: str) -> list[object]:
    command = ["data", "prepare", "cifar10", "--archives", archives, "--no-checksum"]
    return [*command, "--format", "webdataset", "--out", out, *more]


def assert_refused(answer: tuple[int, str, str], message: str) -> None:
    code, _, err = answer
    assert code == 2, err
    assert err.startswith("sbf: ")
    assert err.count("\n") == 1, err
    assert re.search(message, err), err


def test_a_set_is_prepared_checked_and_divided_at_an_address(sbf: Sbf, archives, address) -> None:
    code, out, err = sbf(*prepare(archives, address))
    assert (code, err) == (0, "")
    assert "cifar10, 10 classes, 50 images in train, 10 in val; prepared before" in out
    code, out, err = sbf("data", "check", address)
    assert (code, err) == (0, "")
    assert f"{address}: 4 files are unchanged" in out
    code, out, err = sbf("data", "split", address, "--labelled", "2", "--out", "few.txt")
    assert (code, err) == (0, "")
    assert "few.txt: 20 of 50 training images, 10 classes" in out
    ObjectFolder.at(address).write("val-000000.idx", b"other")
    assert_refused(sbf("data", "check", address), rf"data {address}: 1 changed of 4 files")


def test_what_cannot_be_used_is_one_line(sbf: Sbf, address, monkeypatch) -> None:
    monkeypatch.setattr(execution, "execute", lambda *_: None)
    assert sbf("run", "tiny.yaml")[0] == 0
    for override, message in REFUSED.items():
        assert_refused(sbf("run", "tiny.yaml", override), message)


def test_a_set_may_move_from_a_folder_to_a_store_and_back(sbf: Sbf, archives, address, tmp_path):
    assert sbf(*prepare(archives, tmp_path / "local"))[0] == 0
    runs, folder = tmp_path / "runs", tmp_path / "runs" / "mine" / "data"
    local, store = Data(root=tmp_path / "local"), Data(root=address)
    index_images(local, runs, 0, Display()).save(folder)
    before = DataIndex.load(folder)
    find_again(store, runs, folder, 0)
    moved = DataIndex.load(folder)
    assert (moved.root, moved.digest) == (ObjectFolder.at(address), before.digest)
    assert moved.contents is not None
    find_again(local, runs, folder, 0)
    assert DataIndex.load(folder).root == tmp_path / "local"
    assert sbf(*prepare(archives, "s3://test-bucket/other", "--seed", "1"))[0] == 0
    with pytest.raises(UserError, match=r"s3://test-bucket/other: holds other images, or in other"):
        find_again(Data(root="s3://test-bucket/other"), runs, folder, 0)
    with pytest.raises(UserError, match=r"data.cache_gb = 1e-05 is less than the largest shard"):
        find_again(store, runs, folder, 0)
        find_again(Data(root=address, cache_gb=1e-5), runs, folder, 0)


def test_a_network_is_compressed_on_a_set_at_an_address(address) -> None:
    settings = settings_of("cifar_resnet8", Path("x"), address, "macs=0.5", [])
    assert settings.data.root == address


def test_few_calibration_images_need_no_cache(address, tmp_path) -> None:
    data = Data(root=address, image_size=16)
    index = index_images(data, tmp_path, 0, Display())
    assert calibration_images(data, index, 8, 0).count == 8
    assert not (tmp_path / "caches" / "shards").exists()
