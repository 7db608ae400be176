"""Where the tracking store is, and how it is named without what is secret."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, unquote, unquote_plus, urlsplit

from sbf_dist.errors import UserError, is_secret, without_credentials

SERVERS = ("http", "https", "databricks", "databricks-uc")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_ENCODED = "has a user or password in which / ? # [ must be written %2F %3F %23 %5B"
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
        for secret in sorted(self._secrets(), key=len, reverse=True):
            text = text.replace(secret, "***")
        return without_credentials(" ".join(text.split()))[:300]

    def _secrets(self) -> set[str]:
        """Return what must not be read in a message, as it is written and decoded."""
        parts = urlsplit(self.uri)
        found = [self.password or parts.password]
        for name, value in (one.partition("=")[::2] for one in parts.query.split("&")):
            if is_secret(name):
                found.append(value)
                # A connection string in one of them has a password of its own.
                found += re.findall(r"(?i)\bpwd=([^;]+)", unquote_plus(value))
        return {form for one in found if one for form in (one, unquote(one), unquote_plus(one))}

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
    shown = _shown(uri)
    parts = None
    try:
        parts = urlsplit(uri)
        _ = parts.port  # which is read, and may be wrong, only here
    except ValueError as error:
        # The reason may quote a part of the password, unless that ends before the port.
        quotes = "@" in (uri if parts is None else uri.replace(parts.netloc, "", 1))
        raise _wrong(shown, _ENCODED if quotes else str(error)) from None
    if _is_cut(parts):
        raise _wrong(shown, f"{_ENCODED}, or a path in which @ must be written %40")
    scheme = parts.scheme.split("+")[0] or uri
    if scheme not in SERVERS + DATABASES:
        raise _wrong(shown, "is not a server or database")
    if scheme == "sqlite":
        file = uri.partition(":///")[2]
        if not file:
            raise _wrong(shown, "names no file after sqlite:///")
        path = f"sqlite:///{Path(file).resolve()}"
        return Address(path, without_credentials(path))
    if scheme in ("http", "https"):
        if not parts.hostname:
            raise _wrong(shown, "names no host")
        plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        return Address(
            plain, _shown(plain), _decoded(parts.username) or None, _decoded(parts.password) or None
        )
    return Address(uri, shown)


def _is_cut(parts: SplitResult) -> bool:
    """Whether what is taken for host and port seems to be user and the first part of a password."""
    if not parts.netloc or "@" in parts.netloc:
        return False
    query = "" if "=" in parts.query else parts.query  # user=me@host is one that may have it
    return "@" in parts.path + query + parts.fragment


def _shown(uri: str) -> str:
    """Return a URI without what is secret; it has nothing around it, as URIs in messages have."""
    scheme, separator, rest = uri.partition("://")
    authority, at, host = rest.rpartition("@")
    if at and ("/" not in authority or ":" in authority):
        rest = f"***@{host}"
    return without_credentials(scheme + separator + rest)


def _decoded(part: str | None) -> str | None:
    return None if part is None else unquote(part)


def _wrong(shown: str, reason: str) -> UserError:
    reason = re.sub(r"\s+", " ", reason)
    return UserError(f"tracking URI {shown!r}: {reason}; examples are {_EXAMPLES}")
