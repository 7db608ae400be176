"""MkDocs hook: a page that would load something from another host is a warning, so an error."""

import logging
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page

_LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio)\b[^>]*\ssrc=\"(?:https?:)?//[^\"]+\""
    r"|<link\b(?![^>]*rel=\"canonical\")[^>]*\shref=\"(?:https?:)?//[^\"]+\""
)
_log = logging.getLogger("mkdocs.hooks.site_offline")


def on_post_page(output: str, page: "Page", **_: object) -> str:
    """Look for what is loaded."""
    for match in _LOADED.finditer(output):
        _log.warning("%s loads something from another host: %s", page.file.src_uri, match[0])
    return output
