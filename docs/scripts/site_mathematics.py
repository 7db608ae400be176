"""MkDocs hook: mathematics becomes MathML, which browsers draw without a script."""

import html
import re

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of $…$ and $$…$$.
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """Convert all formulas of a page."""
    content = _INLINE.sub(lambda match: convert(html.unescape(match[1])), content)
    return _BLOCK.sub(
        lambda match: f'<div class="formula">{_block(match[1])}</div>',
        content,
    )


def _block(latex: str) -> str:
    return convert(html.unescape(latex.strip()), display="block")
