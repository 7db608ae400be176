"""The one kind of error that the user can correct."""

import re

_CREDENTIALS = re.compile(r"(?<=://)[^/\s'\"]*@")


class UserError(Exception):
    """A mistake of the user's, answered in one line: the thing, its value, what would be right.

    The command line prints the line and exits with 2; anything else that is raised is our own bug
    and keeps its traceback.
    """


def without_credentials(text: str) -> str:
    """Return `text` with user and password taken out of every URL in it."""
    return _CREDENTIALS.sub("***@", text)


class RunError(Exception):
    """A run that could not go on, through no mistake of the user's; the same command goes on.

    The command line prints the one line that it is and exits with 1.
    """
