import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "scripts" / "site_offline.py"
spec = importlib.util.spec_from_file_location("site_offline", SCRIPT)
site_offline = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site_offline)


def warnings_of(page: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level(logging.WARNING):
        assert (
            site_offline.on_post_page(
                page, page=SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
            )
            == page
        )
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "loaded",
    [
        '<script src="https://unpkg.com/mermaid.js"></script>',
        '<script async src="//unpkg.com/mermaid.js"></script>',
        '<img alt="" src="https://example.org/badge.svg">',
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css?family=Roboto">',
    ],
)
def test_what_a_page_loads_from_another_host_is_named(loaded, caplog):
    (warning,) = warnings_of(f"<p>{loaded}</p>", caplog)
    assert warning.startswith("a.md loads something from another host: <")


@pytest.mark.parametrize(
    "harmless",
    [
        '<a href="https://arxiv.org/abs/2110.12844">paper</a>',
        '<script src="assets/bundle.js"></script>',
        '<link rel="canonical" href="https://example.org/">',
    ],
)
def test_links_and_files_of_the_site_are_not(harmless, caplog):
    assert warnings_of(harmless, caplog) == []
