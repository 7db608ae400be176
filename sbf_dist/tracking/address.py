"""Where the tracking store is, and how it is named without what is secret."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sbf_dist.errors import UserError, without_credentials

SERVERS = ("http", "https", "databricks", "databricks-uc")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_EXAMPLES = "http://HOST:5000, postgresql://USER:PASSWORD@HOST/NAME or sqlite:///FILE"


@dataclass(frozen=True)
class Address:
    """A tracking store.

    uri       as MLflow takes it: a database's with user and password, a server's without
    shown     without user and password, for files, messages and the terminal
    user      that a server asks for, with `password`
    """

    uri: str = field(repr=False)
    shown: str
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    @property
    def scheme(self) -> str:
        return urlsplit(self.uri).scheme.partition("+")[0]

    @property
    def database_file(self) -> Path | None:
        """The file of an SQLite database; None for every other store."""
        return Path(self.uri.partition(":///")[2]) if self.scheme == "sqlite" else None

    def hide(self, text: str) -> str:
        """Return a message of the store's on one line, without what is secret of this address."""
        secret = self.password or urlsplit(self.uri).password
        for written in {secret, unquote(secret)} if secret else ():
            text = text.replace(written, "***")
        return without_credentials(" ".join(text.split()))[:300]

    def enter_credentials(self) -> None:
        """Give user and password to MLflow: by its variables, in this process."""
        for name, value in (
            ("MLFLOW_TRACKING_USERNAME", self.user),
            ("MLFLOW_TRACKING_PASSWORD", self.password),
        ):
            if value is not None:
                os.environ[name] = value


def tracking_address(folder: Path, uri: str | None = None) -> Address:
    """Return the store in use: `uri`, MLFLOW_TRACKING_URI, or the database mlflow.db in `folder`.

    SQLite paths become absolute. UserError, without the password, for a URI that MLflow cannot use.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve()}/mlflow.db"
    shown = without_credentials(uri)
    try:
        parts = urlsplit(uri)
        _ = parts.port  # which is read, and may be wrong, only here
    except ValueError as error:
        raise _wrong(shown, str(error)) from None
    scheme = parts.scheme.split("+")[0] or uri
    if scheme not in SERVERS + DATABASES:
        raise _wrong(shown, "is not a server or database")
    if scheme == "sqlite":
        file = uri.partition(":///")[2]
        if not file:
            raise _wrong(shown, "names no file after sqlite:///")
        path = f"sqlite:///{Path(file).resolve()}"
        return Address(path, path)
    if scheme in ("http", "https"):
        if not parts.hostname:
            raise _wrong(shown, "names no host")
        plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        return Address(
            plain, plain, _decoded(parts.username) or None, _decoded(parts.password) or None
        )
    return Address(uri, shown)


def _decoded(part: str | None) -> str | None:
    return None if part is None else unquote(part)


def _wrong(shown: str, reason: str) -> UserError:
    reason = re.sub(r"\s+", " ", reason)
    return UserError(f"tracking URI {shown!r}: {reason}; examples are {_EXAMPLES}")
