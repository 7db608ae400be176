import time

import pytest
from s3_double import s3_server

from sbf_dist.errors import UserError
from sbf_dist.object_storage import (
    ObjectFolder,
    StoreUnreachableError,
    is_address,
)


@pytest.fixture
def folder(s3):
    return ObjectFolder.at(f"{s3.bucket}/runs/digits")


def test_what_is_written_is_read_again(folder):
    folder.write("a/b.json", b"{}")
    assert folder.read("a/b.json") == b"{}"
    folder.write("a/b.json", b"other")
    assert folder.read("a/b.json") == b"other"


def test_objects_are_listed_by_key_with_size_and_time(folder):
    folder.write("a/b", b"12")
    folder.write("c", b"1")
    assert {key: found.size for key, found in folder.objects().items()} == {"a/b": 2, "c": 1}
    assert set(folder.objects("a")) == {"a/b"}
    assert folder.objects("none") == {}
    assert abs(folder.objects()["c"].modified - time.time()) < 600
    assert set(folder.child("a").objects()) == {"b"}


def test_names_are_those_of_one_level(folder):
    assert folder.names() == []
    folder.write("b/c", b"1")
    folder.write("a", b"1")
    assert folder.names() == ["a", "b"]
    with pytest.raises(UserError, match="s3://no-such-bucket/x: the bucket does not exist"):
        ObjectFolder.at("s3://no-such-bucket/x").names()


def test_parts_of_an_object_are_read(folder):
    folder.write("x", b"0123456789")
    with folder.opened("x") as file:
        assert file.size == 10
        assert file.read(3, 4) == b"3456"
        assert file.read(8, 4) == b"89"
        assert file.read(10, 4) == b""
    with pytest.raises(FileNotFoundError), folder.opened("none"):
        pass


def test_a_folder_does_not_see_its_neighbour(s3, folder):
    ObjectFolder.at(f"{s3.bucket}/runs/digits-2").write("c", b"1")
    assert folder.objects() == {}


def test_files_go_there_and_back(folder, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(range(256)) * 50_000)  # more than one part
    folder.put(source, "x")
    folder.fetch("x", target)
    assert target.read_bytes() == source.read_bytes()


def test_a_missing_object_is_said_and_leaves_no_file(folder, tmp_path):
    assert folder.find("x") is None
    with pytest.raises(FileNotFoundError):
        folder.read("x")
    with pytest.raises(FileNotFoundError):
        folder.fetch("x", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_missing_file_of_this_machine_is_no_trouble_of_the_store(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        folder.put(tmp_path / "none", "x")


def test_removing_twice_is_as_good_as_once(folder):
    folder.write("x", b"1")
    folder.remove("x")
    folder.remove("x")
    assert folder.objects() == {}


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ftp://host/x", r"ftp://host/x: ftp:// is not known; s3://, gs://, .* are"),
        ("s3:///x", "names no bucket, as in s3://BUCKET/FOLDER"),
        ("s3://key:secret@bucket/x", r"s3://\*\*\*@bucket/x: credentials do not belong"),
        ("s3://bucket/x?region=eu", "must end with the folder"),
    ],
)
def test_a_wrong_address_is_one_line(address, said):
    with pytest.raises(UserError, match=said) as caught:
        ObjectFolder.at(address)
    assert "secret" not in str(caught.value)


def test_a_bucket_that_does_not_exist_is_named(s3):
    nowhere = ObjectFolder.at("s3://no-such-bucket/runs")
    for use in (nowhere.objects, lambda: nowhere.write("x", b"")):
        with pytest.raises(UserError, match=r"s3://no-such-bucket/runs.*: the bucket does not"):
            use()


def test_a_store_that_does_not_answer_is_another_error_than_a_mistake(monkeypatch):
    with s3_server() as double:
        gone = double.environment
    for name, value in gone.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreUnreachableError, match="s3://other-bucket/x"):
        ObjectFolder.at("s3://other-bucket").read("x")


def test_addresses_differ_from_folders():
    assert is_address("s3://bucket/x")
    assert is_address("gs://b")
    assert not is_address("/a/b")
    assert not is_address("runs")
    assert not is_address("C:/x")
