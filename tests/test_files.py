"""Files that are there as a whole or not at all."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sbf_dist.errors import UserError
from sbf_dist.files import cache_folder, flush_below, replacing, sha256, write_json, write_text


def test_a_file_is_replaced_once_its_new_content_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_stays_where_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_and_a_device_are_not_replaced_by_a_file(tmp_path):
    device = tmp_path / "device"
    device.symlink_to("/dev/null")
    for place in (tmp_path, device):
        with pytest.raises(UserError, match="is no file, and would be replaced"):
            write_text(place, "text")
    assert device.resolve() == Path("/dev/null")
    assert Path("/dev/null").is_char_device()


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    program = (
        "import os, signal, sys; from pathlib import Path; from sbf_dist.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_two_processes_write_to_places_of_their_own(tmp_path):
    with replacing(tmp_path / "file") as partial:
        assert str(os.getpid()) in partial.name
        partial.touch()


def test_text_json_and_digests(tmp_path):
    write_text(tmp_path / "new" / "text", "ß")
    assert sha256(tmp_path / "new" / "text") == hashlib.sha256("ß".encode()).hexdigest()
    write_json(tmp_path / "content.json", {"a": [1]})
    assert json.loads((tmp_path / "content.json").read_text()) == {"a": [1]}


def test_a_folder_is_flushed_with_all_that_is_in_it(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("x")
    flushed = []

    def note(descriptor):
        flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    monkeypatch.setattr(os, "fsync", note)
    flush_below(tmp_path)
    assert set(flushed) == {str(tmp_path), f"{tmp_path}/inner", f"{tmp_path}/inner/file"}
    assert flushed[-1] == str(tmp_path)


@pytest.mark.parametrize(
    ("ours", "users", "place"),
    [
        ("/disk/caches", "/var/cache/me", "/disk/caches"),
        ("~/caches", None, "/home/me/caches"),
        (None, "/var/cache/me", "/var/cache/me/sbf-dist"),
        (None, "relative/cache", "/home/me/.cache/sbf-dist"),
        ("", "", "/home/me/.cache/sbf-dist"),
        (None, None, "/home/me/.cache/sbf-dist"),
    ],
)
def test_the_cache_is_where_the_environment_says(monkeypatch, ours, users, place):
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in (("SBF_DIST_CACHE", ours), ("XDG_CACHE_HOME", users)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache_folder() == Path(place)
