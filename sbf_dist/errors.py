"""The one kind of error that the user can correct."""

import re

# Before the host: up to the last @ of an authority; where there is a colon, of the whole URL, as a
# password may have slashes that should have been percent-encoded.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/\s'\"]*:[^\s'\"]*|[^/\s'\"]*)@")
_NAME_OF_SECRET = r"pass|pwd|token|secret|key|sig|cred|auth|odbc_connect"
# Among the parameters of a URL, and of a connection string in one of them.
_PARAMETER = re.compile(
    rf"((?:[?&;]|%3B)[^=&;?%\s'\"]*(?:{_NAME_OF_SECRET})[^=&;?%\s'\"]*(?:=|%3D))"
    r"[^&;\s'\"]*[^&;\s'\":,.)]",  # not the punctuation of the sentence that it is in
    re.IGNORECASE,
)
_SECRET = re.compile(_NAME_OF_SECRET, re.IGNORECASE)


class UserError(Exception):
    """A mistake of the user's, answered in one line: the thing, its value, what would be right.

    The command line prints the line and exits with 2; anything else that is raised is our own bug
    and keeps its traceback.
    """


def without_credentials(text: str) -> str:
    """Return `text` with user and password, and secret parameters, taken out of every URL in it."""
    return _PARAMETER.sub(r"\1***", _CREDENTIALS.sub("***@", text))


def is_secret(name: str) -> bool:
    """Whether a parameter of a URL with this name, such as access_token, is not to be shown."""
    return _SECRET.search(name) is not None


class RunError(Exception):
    """A run that could not go on, through no mistake of the user's; the same command goes on.

    The command line prints the one line that it is and exits with 1.
    """
