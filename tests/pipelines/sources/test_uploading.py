"""Sets that are prepared to an address, checked there, and refused where they are of no use."""

from functools import partial
from pathlib import Path

import pytest
from archive_makers import cifar10_python

from pipelines.roots import root_of
from pipelines.sources import units, uploading
from pipelines.sources.folder import index_folder
from pipelines.sources.manifest import MANIFEST, WORK, is_prepared, read_manifest
from pipelines.sources.preparation import prepare
from pipelines.sources.verification import check
from sbf_dist.errors import UserError
from sbf_dist.object_storage import ObjectFolder

SELECTION = {"labelled_per_class": None, "validation": None, "seed": 0}


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    cifar10_python(folder)
    return folder


@pytest.fixture
def address(s3, tmp_path, monkeypatch) -> str:
    """An address where nothing is; shards are small, and this machine's caches are here."""
    monkeypatch.setattr(units, "shuffled_runs", partial(units.shuffled_runs, most_samples=20))
    monkeypatch.setenv("SBF_DIST_CACHE", str(tmp_path / "caches"))
    return f"{s3.bucket}/sets/cifar10"


def prepared(archives, out, **more):
    arguments = {"layout": "webdataset", "checksum": False} | more
    return prepare("cifar10", archives, out, **arguments)


def objects(address) -> dict[str, bytes]:
    folder = ObjectFolder.at(address)
    return {key: folder.read(key) for key in folder.objects()}


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_a_set_at_an_address_is_the_one_of_a_folder(archives, address, tmp_path):
    local = prepared(archives, tmp_path / "out")
    assert prepared(archives, address) == local == read_manifest(root_of(address))
    assert objects(address) == files(tmp_path / "out")
    assert [path for path in (tmp_path / "caches").rglob("*") if path.is_file()] == []
    findings = check(address)
    assert findings.whole
    assert findings.files == check(tmp_path / "out").files == 8
    before = ObjectFolder.at(address).objects()
    assert prepared(tmp_path / "no archives needed", address) == local
    assert ObjectFolder.at(address).objects() == before


def test_no_more_shards_are_on_the_disk_than_are_worked_on(
    archives, address, tmp_path, monkeypatch
):
    monkeypatch.setattr(units, "_threads", lambda: 1)
    most = 0
    take = uploading.Upload.take

    def counted(self, path):
        nonlocal most
        most = max(most, len(list(path.parent.glob("*.tar"))))
        take(self, path)

    monkeypatch.setattr(uploading.Upload, "take", counted)
    prepared(archives, address)
    assert most == 1


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_was_cut_goes_on_on_this_machine_or_another(
    archives, address, tmp_path, monkeypatch, elsewhere
):
    monkeypatch.setattr(units, "_threads", lambda: 1)
    monkeypatch.setattr(units, "IMAGES_PER_REPORT", 1)

    def cuts(title: str, done: int, of: int, unit: str) -> None:
        if title == "images" and done == 45:  # in the third of four shards
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(archives, address, progress=cuts)
    assert not is_prepared(root_of(address))
    assert any(key.startswith(WORK) for key in ObjectFolder.at(address).objects())
    with pytest.raises(UserError, match=f"data {address}: has no set in shards; its preparation"):
        index_folder(address, **SELECTION)
    with pytest.raises(UserError, match=f"data {address}: was begun with other seed 0, not 1"):
        prepared(archives, address, seed=1)
    if elsewhere:
        monkeypatch.setenv("SBF_DIST_CACHE", str(tmp_path / "caches of another machine"))
    seen: list[int] = []
    prepared(
        archives,
        address,
        progress=lambda title, done, *_: seen.append(done) if title == "images" else None,
    )
    assert min(seen) > 40  # two shards were whole
    assert max(seen) == 60
    uncut = tmp_path / "uncut"
    prepared(archives, uncut)
    assert objects(address) == files(uncut)


def test_a_cut_behind_the_manifest_leaves_a_set_that_the_next_call_cleans(
    archives, address, monkeypatch
):
    def cut(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(uploading.Upload, "clean", cut)
        with pytest.raises(KeyboardInterrupt):
            prepared(archives, address)
    assert check(address).whole
    prepared(archives, address)
    assert not [key for key in ObjectFolder.at(address).objects() if key.startswith(WORK)]


def test_an_address_that_holds_anything_else_is_refused_and_left_alone(archives, address):
    ObjectFolder.at(address).write("notes.txt", b"mine")
    with pytest.raises(UserError, match=r"cifar10: holds other files \(notes\.txt\); choose a new"):
        prepared(archives, address)
    assert objects(address) == {"notes.txt": b"mine"}


def test_a_set_of_other_settings_is_not_replaced(archives, address):
    prepared(archives, address)
    with pytest.raises(UserError, match=r"holds cifar10 as webdataset \(seed 0\) already; choose"):
        prepared(archives, address, seed=1)


@pytest.mark.parametrize(
    ("out", "layout", "said"),
    [
        ("s3://test-bucket/x", "folder", "images are kept in shards only; give --format webdata"),
        ("s3://no-such-bucket/x", "webdataset", "s3://no-such-bucket/x: the bucket does not exist"),
        ("ftp://host/x", "webdataset", "ftp:// is not known"),
    ],
)
def test_an_address_of_no_use_is_one_line(archives, address, out, layout, said):
    with pytest.raises(UserError, match=said):
        prepared(archives, out, layout=layout)


def test_what_is_missing_changed_or_superfluous_in_the_store_is_found(archives, address):
    prepared(archives, address)
    folder = ObjectFolder.at(address)
    folder.remove("val-000000.tar")
    data = folder.read("train-000001.tar")
    folder.write("train-000001.tar", data[:600] + b"x" + data[601:])
    folder.write("extra", b"")
    findings = check(address)
    assert findings.kinds() == {
        "missing": ["val-000000.tar"],
        "changed": ["train-000001.tar"],
        "superfluous": ["extra"],
        "unreadable": [],
    }
    with pytest.raises(UserError, match=r"val-000000.tar is missing; sbf data check shows what"):
        index_folder(address, **SELECTION)
    folder.write("val-000000.tar", b"short")
    with pytest.raises(UserError, match=r"val-000000.tar has 5 bytes, had .* when it was prepared"):
        index_folder(address, **SELECTION)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "is empty; sbf data prepare --format webdataset --out ADDRESS writes what is read"),
        (
            {"train/cat/1.jpg": b"", "val/cat/1.jpg": b""},
            "has train, val but no set in shards; sbf data prepare --format webdataset --out",
        ),
    ],
)
def test_an_address_without_a_set_is_one_line_that_says_what_to_do(address, content, said):
    for key, data in content.items():
        ObjectFolder.at(address).write(key, data)
    for use in (index_folder, partial(index_folder, expected="cifar10")):
        with pytest.raises(UserError, match=f"data {address}: {said}"):
            use(address, **SELECTION)


def test_a_bucket_that_does_not_exist_is_named(address):
    with pytest.raises(UserError, match="s3://no-such-bucket/x: the bucket does not exist"):
        index_folder("s3://no-such-bucket/x", **SELECTION)


def test_files_in_class_folders_are_not_read_from_a_store(archives, address, tmp_path):
    prepared(archives, tmp_path / "out", layout="folder")
    for name in (MANIFEST, "samples.parquet"):
        ObjectFolder.at(address).put(tmp_path / "out" / name, name)
    with pytest.raises(UserError, match="holds its images as single files; sbf data prepare --f"):
        index_folder(address, **SELECTION)


def test_a_list_that_does_not_belong_to_the_manifest_is_refused(archives, address):
    prepared(archives, address)
    ObjectFolder.at(address).write("samples.parquet", b"other")
    with pytest.raises(UserError, match=r"samples.parquet: does not belong to manifest.json"):
        index_folder(address, **SELECTION)
