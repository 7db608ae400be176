"""Archives as their publishers give them: found, checked, and read without trusting their content.

Nothing is ever extracted to a path that an archive names: members are found by name, read into
memory or by offset, and written where this project decides. What no honest archive holds (a path
that leads out of the folder, a link, a device, a negative or an enormous size) is refused all the
same.
"""

import gzip
import hashlib
import os
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path, PurePosixPath
from stat import S_IFMT, S_ISDIR, S_ISREG
from types import TracebackType
from typing import Self

from sbf_dist.errors import UserError

# title, done, of, unit
Progress = Callable[[str, int, int, str], None]

MAX_IMAGE_BYTES = 64 * 2**20  # the largest of ILSVRC-2012 has 15 MB
_MAX_READ_BYTES = 64 * 2**20  # of a tar's headers and metadata at once
_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Archive:
    """One file as it is distributed: its name, its published MD5 sum, where it comes from."""

    name: str
    md5: str
    origin: str


@dataclass(frozen=True)
class Member:
    """A regular file within an uncompressed tar file: its bytes are at [offset, offset + size)."""

    name: str
    offset: int
    size: int


def locate(folder: Path, alternatives: Sequence[Archive]) -> tuple[Archive, Path]:
    """The first of `alternatives` that lies in `folder`.

    UserError naming the file, its folder and its origin if none does.
    """
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"archives {folder}: is not a folder; put {alternatives[0].name} into it")
    for archive in alternatives:
        if (folder / archive.name).is_file():
            return archive, folder / archive.name
    names = " or ".join(archive.name for archive in alternatives)
    raise UserError(
        f"archive {folder / alternatives[0].name}: is missing; put {names} from "
        f"{alternatives[0].origin} into {folder}"
    )


def md5_of(path: Path, progress: Progress | None = None) -> str:
    """The MD5 sum of a file, 32 hexadecimal digits; read in pieces of 1 MiB."""
    digest = hashlib.md5(usedforsecurity=False)
    size, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            if progress is not None and (done == size or done % 10**8 < len(block)):
                progress(f"MD5 of {path.name} (MB)", ceil(done / 1e6), ceil(size / 1e6), "MB")
    return digest.hexdigest()


def verify(archive: Archive, path: Path, md5: str) -> None:
    """UserError if `md5`, found for `path`, is not the published one."""
    if md5 != archive.md5:
        raise UserError(
            f"archive {path}: MD5 {md5} is not the published {archive.md5}; download it again, or "
            "allow other archives with --no-checksum"
        )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a damaged archive raises into one line."""
    damage = (
        tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError,
        NotImplementedError, UnicodeDecodeError,
    )  # fmt: skip
    try:
        yield
    except damage as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"archive {path}: cannot be read ({reason}); download it again") from error


class TarFile:
    """An uncompressed tar file, read by offset from any number of threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._size = os.fstat(self._handle).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._handle)

    def members(self, within: Member | None = None) -> Iterator[Member]:
        """All regular files, or those of the tar file that is the member `within`.

        Only headers are read. UserError for a member that is not a file or a folder with a
        harmless path, or that ends beyond its archive.
        """
        start, size = (within.offset, within.size) if within else (0, self._size)
        window = _Window(self._handle, start, size)
        with reading(self.path), tarfile.open(fileobj=window, mode="r:") as tar:  # type: ignore[call-overload]
            while (info := tar.next()) is not None:
                tar.members = []  # they would pile up
                if not _is_file(self.path, info):
                    continue
                if info.offset_data + info.size > size:
                    raise UserError(
                        f"archive {self.path}: ends within {info.name}; download it again"
                    )
                yield Member(info.name, start + info.offset_data, info.size)

    def read(self, member: Member) -> bytes:
        """The bytes of one member."""
        with reading(self.path):
            data = os.pread(self._handle, member.size, member.offset)
        if len(data) != member.size:
            raise UserError(f"archive {self.path}: ends within {member.name}; download it again")
        return data


class _Window:
    """The bytes [start, start + size) of a file, as a file of its own; for tarfile."""

    def __init__(self, handle: int, start: int, size: int) -> None:
        self._handle, self._start, self._size, self._at = handle, start, size, 0

    def tell(self) -> int:
        return self._at

    def seek(self, at: int, whence: int = 0) -> int:
        if whence != 0 or at < 0:
            raise tarfile.ReadError("a header points outside the archive")
        self._at = at
        return at

    def read(self, count: int = -1) -> bytes:
        # A header may claim any length for the metadata behind it.
        if not 0 <= count <= _MAX_READ_BYTES:
            raise tarfile.ReadError(f"a header claims {count} bytes of metadata")
        data = os.pread(
            self._handle, max(0, min(count, self._size - self._at)), self._start + self._at
        )
        self._at += len(data)
        return data

    def close(self) -> None:
        """The handle is the TarFile's."""


def compressed_members(path: Path, largest: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Names and readers of all regular files in a .tar.gz, in one pass over it.

    A reader is to be called before the next member is asked for. UserError for members as in
    TarFile.members, and where more than `largest` bytes come out of the archive.
    """
    with (
        reading(path),
        gzip.open(path) as unpacked,
        tarfile.open(fileobj=_Limited(path, unpacked, largest), mode="r|") as tar,  # type: ignore[call-overload]
    ):
        while (info := tar.next()) is not None:
            tar.members = []
            if _is_file(path, info):
                file = tar.extractfile(info)
                assert file is not None, f"{info.name} is not a file"
                yield info.name, file.read


class _Limited:
    """A stream of which at most `largest` bytes may be read."""

    def __init__(self, path: Path, stream: gzip.GzipFile, largest: int) -> None:
        self._path, self._stream, self._largest, self._left = path, stream, largest, largest

    def read(self, count: int) -> bytes:
        data = self._stream.read(min(count, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise UserError(
                f"archive {self._path}: holds more than {self._largest:,} bytes, which the "
                "published one does not"
            )
        return data


def _is_file(path: Path, info: tarfile.TarInfo) -> bool:
    """Whether a member is a regular file; False for a folder, UserError for anything else."""
    _check_path(path, info.name)
    if info.size < 0:
        raise UserError(f"archive {path}: {info.name!a} has a negative size")
    if info.isdir():
        return False
    if not info.isreg() or info.issparse():
        raise UserError(
            f"archive {path}: {info.name!a} is a link, a device or another special file, which "
            "does not belong there"
        )
    return True


def _check_path(path: Path, name: str) -> None:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or not name.isprintable():
        raise UserError(f"archive {path}: {name!a} leads out of its folder or is not a plain name")


class ZipFile:
    """A zip file, read by name from any number of threads.

    UserError for members that are not files or folders with harmless paths, and if they would
    fill more than `largest` bytes together or one more than MAX_IMAGE_BYTES.
    """

    def __init__(self, path: Path, largest: int) -> None:
        self.path = path
        self._lock = threading.Lock()  # zipfile counts its readers without one
        with reading(path):
            self._zip = zipfile.ZipFile(path)
        try:
            self.sizes = dict(self._files())
            if sum(self.sizes.values()) > largest:
                raise UserError(
                    f"archive {path}: holds more than {largest:,} bytes, which the published one "
                    "does not"
                )
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._zip.close()

    def _files(self) -> Iterator[tuple[str, int]]:
        for info in self._zip.infolist():
            _check_path(self.path, info.filename)
            mode = info.external_attr >> 16
            if S_IFMT(mode) and not (S_ISREG(mode) or S_ISDIR(mode)):
                raise UserError(
                    f"archive {self.path}: {info.filename!a} is a link, a device or another "
                    "special file, which does not belong there"
                )
            if info.file_size > MAX_IMAGE_BYTES:
                raise UserError(
                    f"archive {self.path}: {info.filename!a} would have {info.file_size:,} bytes"
                )
            if not info.is_dir():
                yield info.filename, info.file_size

    def read(self, name: str) -> bytes:
        """The bytes of one member, checked against its CRC, never more than its stated size."""
        with self._lock, reading(self.path):
            return self._zip.read(name)
