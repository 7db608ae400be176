import gzip
import hashlib
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from archive_makers import tar

from pipelines.sources import archives
from pipelines.sources.archives import Archive, TarFile, ZipFile, compressed_members, locate
from sbf_dist.errors import UserError

ONE = Archive("one.tar.gz", hashlib.md5(b"content").hexdigest(), "https://one.example")
OTHER = Archive("other.tar.gz", "0" * 32, "https://one.example")


def entry(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def test_an_archive_or_its_alternative_is_found(tmp_path):
    (tmp_path / "other.tar.gz").write_bytes(b"")
    assert locate(tmp_path, [ONE, OTHER]) == (OTHER, tmp_path / "other.tar.gz")
    (tmp_path / "one.tar.gz").write_bytes(b"")
    assert locate(tmp_path, [ONE, OTHER]) == (ONE, tmp_path / "one.tar.gz")


def test_a_missing_archive_is_reported_with_its_name_its_place_and_its_origin(tmp_path):
    with pytest.raises(UserError) as raised:
        locate(tmp_path, [ONE, OTHER])
    assert str(raised.value) == (
        f"archive {tmp_path}/one.tar.gz: is missing; put one.tar.gz or other.tar.gz from "
        f"https://one.example into {tmp_path}"
    )
    with pytest.raises(UserError, match=r"nowhere: is not a folder; put one\.tar\.gz into it"):
        locate(tmp_path / "nowhere", [ONE])


def test_an_md5_sum_is_compared_with_the_published_one(tmp_path):
    path = tmp_path / "one.tar.gz"
    path.write_bytes(b"content")
    calls: list[tuple] = []
    archives.verify(ONE, path, archives.md5_of(path, lambda *call: calls.append(call)))
    assert calls
    path.write_bytes(b"Content")
    with pytest.raises(UserError, match=rf"MD5 \w{{32}} is not the published {ONE.md5}"):
        archives.verify(ONE, path, archives.md5_of(path))


def test_a_tar_file_within_a_tar_file_is_read_by_offset(tmp_path):
    inner = tar(tmp_path / "inner.tar", {"a": b"first", "b": b"second" * 200}).read_bytes()
    with TarFile(tar(tmp_path / "outer.tar", {"x": b"x", "inner.tar": inner})) as file:
        outer = {member.name: member for member in file.members()}
        assert list(outer) == ["x", "inner.tar"]
        members = list(file.members(outer["inner.tar"]))
        assert [file.read(member) for member in members] == [b"first", b"second" * 200]


HOSTILE = {
    "../outside": (entry("../outside"), "leads out of its folder"),
    "a/../../outside": (entry("a/../../outside"), "leads out of its folder"),
    "absolute": (entry("/etc/outside"), "leads out of its folder"),
    "backslash": (entry("..\\outside"), "leads out of its folder"),
    "line break": (entry("a\nb"), "is not a plain name"),
    "symbolic link": (entry("a", tarfile.SYMTYPE, "/etc/passwd"), "is a link, a device"),
    "hard link": (entry("a", tarfile.LNKTYPE, "../../x"), "is a link, a device"),
    "device": (entry("a", tarfile.CHRTYPE), "is a link, a device"),
    "fifo": (entry("a", tarfile.FIFOTYPE), "is a link, a device"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_members_that_no_honest_archive_has_are_refused(tmp_path, kind):
    info, message = HOSTILE[kind]
    for mode in ("w", "w:gz"):
        path = tmp_path / f"hostile{mode[1:].replace(':', '.')}"
        with tarfile.open(path, mode) as file:
            file.addfile(info)
        with pytest.raises(UserError, match=message) as raised:
            if mode == "w":
                with TarFile(path) as read:
                    list(read.members())
            else:
                list(compressed_members(path, 2**20))
        assert "\n" not in str(raised.value)
    assert {p.name for p in tmp_path.iterdir()} == {"hostile", "hostile.gz"}


def with_size(path: Path, name: str, size: bytes) -> Path:
    """A tar file whose only header claims `size` (12 bytes)."""
    header = bytearray(entry(name).tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    path.write_bytes(bytes(header) + b"\0" * 10240)
    return path


def test_sizes_that_lead_out_of_the_archive_are_refused(tmp_path):
    negative = b"\xff" * 4 + struct.pack(">q", -1024)
    for size, message in {
        negative: "negative size|cannot be read",
        b"77777777777\0": "ends within",
    }.items():
        with (
            pytest.raises(UserError, match=message),
            TarFile(with_size(tmp_path / "x.tar", "a", size)) as file,
        ):
            list(file.members())


def test_metadata_of_any_claimed_length_is_not_read(tmp_path):
    path = with_size(tmp_path / "x.tar", "a", b"77777777777\0")
    header = bytearray(path.read_bytes())
    header[156:157] = tarfile.XHDTYPE
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    path.write_bytes(header)
    with pytest.raises(UserError, match="bytes of metadata"), TarFile(path) as file:
        list(file.members())


def test_a_truncated_tar_file_is_reported(tmp_path):
    path = tar(tmp_path / "x.tar", {"a": b"1" * 5000, "b": b"2" * 5000})
    os.truncate(path, 7000)
    with TarFile(path) as file, pytest.raises(UserError, match=r"ends within b|cannot be read"):
        list(file.members())
    packed = tmp_path / "x.tar.gz"
    packed.write_bytes(gzip.compress(os.urandom(10000))[:5000])
    with pytest.raises(UserError, match="cannot be read"):
        list(compressed_members(packed, 2**20))


def test_what_swells_beyond_its_bounds_is_refused(tmp_path):
    packed = tar(tmp_path / "x.tar.gz", {"a": b"\0" * 2**22}, "w:gz")
    assert packed.stat().st_size < 2**14
    with pytest.raises(UserError, match="holds more than 1,048,576 bytes"):
        [read() for _, read in compressed_members(packed, 2**20)]
    assert [len(read()) for _, read in compressed_members(packed, 2**23)] == [2**22]


def zipped(path: Path, members: dict[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, data)
    return path


def test_a_zip_file_is_read_by_name(tmp_path):
    with ZipFile(zipped(tmp_path / "x.zip", {"a/": b"", "a/b": b"data"}), 2**20) as file:
        assert file.sizes == {"a/b": 4}
        assert file.read("a/b") == b"data"


@pytest.mark.parametrize(
    ("members", "mode", "message"),
    [
        ({"../x": b""}, 0, "leads out of its folder"),
        ({"/x": b""}, 0, "leads out of its folder"),
        ({"a\\..\\x": b""}, 0, "leads out of its folder"),
        ({"x": b"/etc/passwd"}, 0o120777, "is a link, a device"),
        ({"x": b""}, 0o020666, "is a link, a device"),
        ({"x": b"\0" * 2**21, "y": b"\0" * 2**21}, 0, "holds more than 3,145,728 bytes"),
        ({"x": b"\0" * (2**26 + 1)}, 0, "would have 67,108,865 bytes"),
    ],
)
def test_zip_files_with_dangerous_members_are_refused(tmp_path, members, mode, message):
    path = zipped(tmp_path / "x.zip", members, mode)
    with pytest.raises(UserError, match=message):
        ZipFile(path, 3 * 2**20)
    assert list(tmp_path.iterdir()) == [path]


def test_a_zip_member_that_lies_about_its_size_is_not_read_beyond_it(tmp_path):
    path = zipped(tmp_path / "x.zip", {"x": b"\0" * 2**20})
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", 2**20), struct.pack("<I", 10)))
    with ZipFile(path, 2**10) as file, pytest.raises(UserError, match="cannot be read"):
        file.read("x")


def test_what_is_no_archive_is_reported(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(UserError, match=r"cannot be read.*download it again"):
        ZipFile(path, 2**20)
    with pytest.raises(UserError, match="cannot be read"), TarFile(path) as file:
        list(file.members())
    with pytest.raises(UserError, match="cannot be read"):
        list(compressed_members(path, 2**20))
