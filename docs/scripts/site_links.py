"""MkDocs hook: pages and links of the repository work in the site as they do in the repository.

README, ARCHITECTURE and CHANGELOG are pages of the site. A link to another file outside docs/ leads
to a copy of that file under source/.
"""

import os
import posixpath
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)(?P<path>[^)\s#]+)(?P<rest>#[^)\s]*)?(?=[)\s])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    root = Path(config.config_file_path).parent
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between files of the site."""
    root = Path(config.config_file_path).parent
    assert page.file.abs_src_path is not None
    here = PurePosixPath(Path(page.file.abs_src_path).relative_to(root).as_posix()).parent
    folder = posixpath.dirname(page.file.src_uri)

    def translated(match: re.Match[str]) -> str:
        target = posixpath.normpath(str(here / match["path"]))
        place = _place(target, root, config, files)
        if place is None:  # MkDocs names it: no such file
            return match[0]
        return os.path.relpath(place, folder or ".") + (match["rest"] or "")

    return _LINK.sub(translated, markdown)


def _place(target: str, root: Path, config: MkDocsConfig, files: Files) -> str | None:
    """Return where a file of the repository is in the site; None if there is no such file."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target.startswith("..") or not (root / target).is_file():
        return None
    copy = f"source/{target}"
    if files.get_file_from_path(copy) is None:
        files.append(File.generated(config, copy, abs_src_path=str(root / target)))
    return copy
