"""Writes docs/command-line.md: every command with its options, from the commands' own help.

python docs/scripts/command_page.py
"""

import re
from pathlib import Path

from typer.cli import app
from typer.testing import CliRunner

PAGE = Path(__file__).parents[1] / "command-line.md"
INTRODUCTION = """\
# Command line

Every command, as `sbf COMMAND --help` prints it. What the commands share, and how they are used, is
in [commands](commands.md). This page is generated (`python docs/scripts/command_page.py`); a
test compares it with the commands.
"""
_LIST = re.compile(r"\n\n\n((?:[^\n]+\n)+)")  # what help texts align by hand


def page() -> str:
    """Return the whole page."""
    result = CliRunner().invoke(app, ["launchers.cli", "utils", "docs", "--name", "sbf"])
    if result.exit_code:
        raise RuntimeError(f"typer: {result.output}") from result.exception
    text = result.output.replace("# `sbf`\n", "## `sbf`\n", 1).replace("\b", "")
    text = _LIST.sub(lambda match: "\n\n" + re.sub("(?m)^", "    ", match[1]).rstrip(" "), text)
    return INTRODUCTION + "\n" + text.rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
