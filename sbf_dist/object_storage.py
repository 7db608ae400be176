"""Folders in object stores by their address, s3://BUCKET/PREFIX, gs://… or abfs://…, by pyarrow.

Credentials, region and endpoint come from where each store's own tools take them (for S3: the AWS_
variables, ~/.aws, the machine's role); none is in an address.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sbf_dist.errors import UserError, without_credentials
from sbf_dist.files import replacing

SCHEMES = ("s3", "gs", "abfs", "abfss")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
CONNECTIONS = 64  # at once, of a process: reading many small parts is a matter of latency
_CONNECT_SECONDS = 10
_REQUEST_SECONDS = 60
_ATTEMPTS = 5  # of each request, with growing pauses, by the store's own client
_COPIED_BYTES = 8 << 20  # at a time
# What clients say, in lower case, and what it means for the user.
_CAUSES = (
    (("no_such_bucket", "nosuchbucket", "containernotfound"), "the bucket does not exist"),
    (
        (
            "access_denied",
            "accessdenied",
            "forbidden",
            "signature",
            "invalid_access_key",
            "http 403",
        ),
        "access is denied; check the credentials and what they may do",
    ),
    (
        ("credential", "no identity", "unauthenticated", "http 401"),
        "no credentials were found; set them as the store's own tools need them",
    ),
)


class StoreUnreachableError(ConnectionError):
    """The object store does not answer, or refuses for now: another try may succeed."""


@dataclass(frozen=True)
class StoredObject:
    """An object: its size in bytes, and when it was written, in seconds since 1970."""

    size: int
    modified: float


@dataclass(frozen=True)
class ObjectFolder:
    """The objects whose names begin with the prefix of an address; keys are what follows it.

    What it does raises FileNotFoundError where an object is not there, StoreUnreachableError, and
    UserError where the bucket does not exist or access is denied.
    """

    address: str

    @classmethod
    def at(cls, address: str) -> "ObjectFolder":
        """UserError: it is no address of an object store, or names no bucket."""
        parts = urlsplit(address)
        shown = without_credentials(address)
        if parts.scheme not in SCHEMES:
            known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
            raise UserError(f"{shown}: {parts.scheme}:// is not known; {known} are")
        if not parts.netloc:
            raise UserError(f"{shown}: names no bucket, as in {parts.scheme}://BUCKET/FOLDER")
        if parts.username is not None and parts.scheme == "s3":
            raise UserError(f"{shown}: credentials do not belong into an address")
        if parts.query or parts.fragment:
            raise UserError(f"{shown}: must end with the folder, without ? and #")
        return cls(address.rstrip("/"))

    def __str__(self) -> str:
        return without_credentials(self.address)

    def child(self, name: str) -> "ObjectFolder":
        """Return the folder `name` in this one."""
        return ObjectFolder(f"{self.address}/{name}")

    def objects(self, below: str = "") -> dict[str, StoredObject]:
        """Return all objects whose keys lie below the folder `below`, by key; {} for none."""
        from pyarrow.fs import FileSelector, FileType

        with self._explained(below):
            system, root = self._place("")
            base = f"{root}/{below}".rstrip("/")
            try:  # pyarrow's allow_not_found would take a missing bucket for an empty one
                found = system.get_file_info(FileSelector(base, recursive=True))
            except FileNotFoundError:
                return {}
            return {
                info.path.removeprefix(f"{root}/"): StoredObject(info.size, info.mtime_ns / 1e9)
                for info in found
                if info.type == FileType.File
            }

    def names(self) -> list[str]:
        """Return the names of the objects and folders right in this one, sorted; [] for none."""
        from pyarrow.fs import FileSelector

        with self._explained(""):
            system, root = self._place("")
            try:
                return sorted(info.base_name for info in system.get_file_info(FileSelector(root)))
            except FileNotFoundError:
                return []

    def find(self, key: str) -> StoredObject | None:
        """Return the object `key`; None where there is none."""
        from pyarrow.fs import FileType

        with self._explained(key):
            system, place = self._place(key)
            info = system.get_file_info(place)
            if info.type != FileType.File:
                return None
            return StoredObject(info.size, info.mtime_ns / 1e9)

    def read(self, key: str) -> bytes:
        """Return what an object holds."""
        with self._explained(key):
            system, place = self._place(key)
            with system.open_input_stream(place) as stream:
                return bytes(stream.read())

    @contextmanager
    def opened(self, key: str) -> Iterator["OpenObject"]:
        """Open an object to read parts of it."""
        with self._explained(key):
            system, place = self._place(key)
            file = system.open_input_file(place)
        with file:
            yield OpenObject(self, key, file)

    def write(self, key: str, data: bytes) -> None:
        """Write an object, in place of one of that key; it is there as a whole or not at all."""
        with self._explained(key):
            system, place = self._place(key)
            with system.open_output_stream(place) as stream:
                stream.write(data)

    def fetch(self, key: str, path: Path) -> None:
        """Write an object to the file `path`, whose folder is there, whole or not at all."""
        with self._explained(key), replacing(path) as partial:
            system, place = self._place(key)
            with system.open_input_stream(place) as stream, partial.open("wb") as file:
                shutil.copyfileobj(stream, file, _COPIED_BYTES)

    def put(self, path: Path, key: str) -> None:
        """Write the file `path` to an object, in place of one of that key.

        A file that cannot be read to its end may leave an object that is not whole.
        """
        with self._explained(key):
            system, place = self._place(key)
            with path.open("rb") as file, system.open_output_stream(place) as stream:
                shutil.copyfileobj(file, stream, _COPIED_BYTES)

    def remove(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""
        with self._explained(key):
            system, place = self._place(key)
            try:
                system.delete_file(place)
            except FileNotFoundError:
                return

    def remove_all(self, below: str) -> None:
        """Remove all objects below a folder; nothing happens where there is none."""
        with self._explained(below):
            system, place = self._place(below)
            try:
                system.delete_dir(place)
            except FileNotFoundError:
                return

    def _place(self, key: str) -> tuple[Any, str]:
        scheme, _, rest = self.address.partition("://")
        system, root = _system(scheme, rest.partition("/")[0])
        inside = "/".join(part for part in (rest.partition("/")[2], key) if part)
        return system, f"{root}/{inside}".rstrip("/")

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (UserError, FileNotFoundError):
            raise
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise  # of a file on this machine
            raise _judged(f"{self.address}/{key}".rstrip("/"), error) from error


class OpenObject:
    """An object whose parts are read, each with a request of its own, by any number of threads."""

    def __init__(self, folder: ObjectFolder, key: str, file: Any) -> None:
        self._folder, self._key, self._file = folder, key, file
        self.size: int = file.size()  # bytes

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes from `offset` on, fewer where the object ends before.

        Raises what ObjectFolder does.
        """
        wanted = max(0, min(count, self.size - offset))
        with self._folder._explained(self._key):
            data = bytes(self._file.read_at(wanted, offset))
            if len(data) < wanted:  # pyarrow does not say so
                raise OSError("the connection ended before the answer did")
            return data


def is_address(place: str) -> bool:
    """Whether a place is given by an address with a scheme, not as a folder of this machine."""
    return _ADDRESS.match(place) is not None


def _judged(what: str, error: Exception) -> Exception:
    said = " ".join(str(error).split())
    lower = said.lower()
    for signs, meaning in _CAUSES:
        if any(sign in lower for sign in signs):
            return UserError(f"{without_credentials(what)}: {meaning}")
    return StoreUnreachableError(f"{without_credentials(what)}: {said}")


def _system(scheme: str, bucket: str) -> tuple[Any, str]:
    """Return the file system that an address is of, and its bucket as pyarrow names it."""
    if scheme != "s3":
        return _other_system(scheme, bucket)
    variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    endpoint = next((os.environ[name] for name in variables if os.environ.get(name)), None)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return _s3(bucket, endpoint, region), bucket


@cache
def _other_system(scheme: str, bucket: str) -> tuple[Any, str]:
    from pyarrow import fs

    system, root = fs.FileSystem.from_uri(f"{scheme}://{bucket}")
    return system, root.rstrip("/")


@cache
def _s3(bucket: str, endpoint: str | None, region: str | None) -> Any:
    import pyarrow as pa
    from pyarrow import fs

    # A client has as many connections as pyarrow has threads for input, 25 at least.
    pa.set_io_thread_count(max(pa.io_thread_count(), CONNECTIONS))
    return fs.S3FileSystem(
        region=region or (None if endpoint else fs.resolve_s3_region(bucket)),
        endpoint_override=endpoint,
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    )
