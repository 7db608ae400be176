import dataclasses
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pytest
from archive_makers import cifar100_python

from pipelines.sources.listing import list_images
from pipelines.sources.manifest import SCHEMA, read_manifest, read_samples, write_samples
from pipelines.sources.preparation import prepare
from pipelines.sources.verification import check
from sbf_dist.errors import UserError


@pytest.fixture(params=["folder", "webdataset"])
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    cifar100_python(tmp_path / "archives")
    prepare(
        "cifar100", tmp_path / "archives", tmp_path / "out", layout=request.param, checksum=False
    )
    return tmp_path / "out"


def some_file(root: Path) -> Path:
    return min(path for path in root.rglob("*") if path.suffix in (".png", ".tar"))


def test_a_prepared_set_is_whole(prepared):
    calls: list[tuple] = []
    findings = check(prepared, lambda *call: calls.append(call))
    assert findings.whole
    assert findings.files == len([p for p in prepared.rglob("*") if p.is_file()]) - 2
    assert calls[-1] == ("files", findings.files, findings.files, "files")


def test_one_changed_bit_is_found(prepared):
    path = some_file(prepared)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    findings = check(prepared)
    assert findings.changed == [str(path.relative_to(prepared))]
    assert not findings.missing
    assert not findings.superfluous


def test_missing_and_superfluous_files_are_named(prepared):
    path = some_file(prepared)
    path.rename(path.with_name("other.png"))
    findings = check(prepared)
    assert findings.missing == [str(path.relative_to(prepared))]
    assert findings.superfluous == [str(path.with_name("other.png").relative_to(prepared))]
    assert not findings.whole


def test_a_file_that_cannot_be_read_is_named(prepared):
    path = some_file(prepared)
    path.unlink()
    path.symlink_to(path.name)  # a loop
    findings = check(prepared)
    name = str(path.relative_to(prepared))
    assert findings.unreadable == [f"{name}: Too many levels of symbolic links"]


def test_a_manifest_that_was_edited_is_refused(prepared):
    path = prepared / "manifest.json"
    text = path.read_text()
    content = json.loads(text)
    for change, message in (
        ({"counts": {"train": 17, "val": 8}}, r"manifest\.json has 17 images in train, .* 16"),
        ({"samples": "0" * 64}, r"samples\.parquet: does not belong to manifest\.json"),
        ({"format": 9}, "was written by another version"),
        ({"layout": "zip"}, "cannot be read .layout 'zip'"),
        ({"shards": [{"file": "../x.tar"}]}, r"shard '\.\./x\.tar'"),
        ({"more": 1}, "cannot be read"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=message) as raised:
            check(prepared)
        assert "\n" not in str(raised.value)
    path.write_text(text[:100])
    with pytest.raises(UserError, match="cannot be read"):
        check(prepared)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("file", "../../etc/passwd"),
        ("file", "train/../x.png"),
        ("file", "other/cat/x.png"),
        ("label", 4),
        ("label", -1),
        ("shard", 2),
        ("shard", -2),
    ],
)
def test_a_list_of_samples_that_leads_elsewhere_is_refused(prepared, column, value):
    manifest = read_manifest(prepared)
    rows = read_samples(prepared, manifest).to_pylist()
    rows[3][column] = value
    samples = write_samples(prepared, pa.Table.from_pylist(rows, schema=SCHEMA))
    dataclasses.replace(manifest, samples=samples).write(prepared)
    for read in (check, list_images):
        with pytest.raises(UserError, match=r"samples\.parquet: has files, classes or shards that"):
            read(prepared)


def test_a_list_of_samples_that_is_no_parquet_is_refused(prepared):
    (prepared / "samples.parquet").write_bytes(b"PAR1")
    digest = hashlib.sha256(b"PAR1").hexdigest()
    dataclasses.replace(read_manifest(prepared), samples=digest).write(prepared)
    with pytest.raises(UserError, match=r"samples\.parquet: cannot be read"):
        check(prepared)


def test_a_folder_without_a_manifest_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"has no manifest\.json; see sbf data prepare"):
        check(tmp_path)
    (tmp_path / ".preparing").mkdir()
    with pytest.raises(UserError, match="its preparation is not finished"):
        check(tmp_path)
