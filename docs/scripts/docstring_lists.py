"""Griffe extension: what a docstring says of each argument or attribute becomes a list.

In the code such lines are `name: what it is`, or `name   what it is`, continued further in.
"""

import re
from typing import Any

import griffe

_ENTRY = re.compile(r"(?P<name>[a-z_][\w, ]*?)(?:: |  +)(?P<text>\S.*)")
_NEXT = re.compile(r"(?<=[.;]) (?:and )?([a-z_]\w*): ")  # a further entry in the same line


class DocstringLists(griffe.Extension):
    """Rewrites the docstrings of functions and classes."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Look for entries in one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = as_lists(obj.docstring.value)


def as_lists(text: str) -> str:
    """Return a docstring with Markdown lists."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join([paragraphs[0], *map(_as_list, paragraphs[1:])])


def _as_list(paragraph: str) -> str:
    lines = paragraph.splitlines()
    if not _ENTRY.match(lines[0]):
        return paragraph
    entries: list[str] = []
    for line in lines:
        entry = _ENTRY.match(line)
        if entry:
            entries.append(f"- **{entry['name']}**: {entry['text']}")
        else:
            entries[-1] += f" {line.strip()}"
    return "\n".join(_NEXT.sub(r"\n- **\1**: ", entry) for entry in entries)
