"""MkDocs hook: mathematics becomes MathML, which browsers draw without a script."""

import html
import logging
import re

from latex2mathml.converter import convert
from mkdocs.structure.pages import Page

# What pymdownx.arithmatex makes of $…$ and $$…$$.
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
_log = logging.getLogger("mkdocs.hooks.site_mathematics")


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Convert all formulas of a page; one that is not understood is a warning, so an error."""

    def converted(latex: str, display: str) -> str:
        mathml = convert(html.unescape(latex.strip()), display=display)
        if "\\" in mathml:
            _log.warning("%s has a formula that is not understood: %s", page.file.src_uri, latex)
        return mathml

    content = _INLINE.sub(lambda match: converted(match[1], "inline"), content)
    return _BLOCK.sub(
        lambda match: f'<div class="formula">{converted(match[1], "block")}</div>', content
    )
