from pathlib import Path

import pytest

from pipelines.roots import holds, located, read, root_of, way
from sbf_dist.errors import UserError
from sbf_dist.object_storage import ObjectFolder

SET = ObjectFolder.at("s3://bucket/sets/one")


def test_paths_are_folders_of_this_machine_and_addresses_are_not(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert root_of("x") == root_of(Path("x")) == tmp_path / "x"
    assert root_of("~/x") == Path("/home/me/x")
    assert root_of("s3://bucket/sets/one/") == SET


def test_files_are_read_and_found_in_both(s3, tmp_path):
    folder = ObjectFolder.at(f"{s3.bucket}/x")
    folder.write("a", b"1")
    (tmp_path / "a").write_bytes(b"1")
    for root in (folder, tmp_path):
        assert read(root, "a") == b"1"
        assert (holds(root, "a"), holds(root, "b")) == (True, False)
        with pytest.raises(FileNotFoundError):
            read(root, "b")


@pytest.mark.parametrize(
    ("there", "path", "place"),
    [
        (SET, ".", (SET, "x.tar")),
        (ObjectFolder.at("s3://bucket/sets/two"), "../two", ("s3://bucket", "sets/two/x.tar")),
        (ObjectFolder.at("s3://bucket"), "../..", ("s3://bucket", "x.tar")),
        (ObjectFolder.at("s3://bucket/sets/one/more"), "more", (SET, "more/x.tar")),
    ],
)
def test_names_lead_from_one_set_to_another_of_the_bucket(there, path, place):
    folder, key = place
    folder = folder if isinstance(folder, ObjectFolder) else ObjectFolder.at(folder)
    assert way(SET, there) == path
    name = "x.tar" if path == "." else f"{path}/x.tar"
    assert located(SET, name) == (folder, key)


def test_a_folder_is_left_by_where_it_really_is(tmp_path):
    (tmp_path / "deep" / "set").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "set")
    assert way(tmp_path / "link", tmp_path / "other") == "../../other"


@pytest.mark.parametrize("there", [ObjectFolder.at("s3://other/x"), Path("/x")])
def test_two_places_that_no_name_joins_are_one_line(there):
    with pytest.raises(UserError, match=r"data.unlabelled .*x: must lie where data.root does"):
        way(SET, there)
