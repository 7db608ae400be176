"""A small image folder that the tests share."""

from pathlib import Path

import pytest
from pictures import write_plain

from pipelines.index import DataIndex
from pipelines.sources.folder import index_folder

SMALL = {"ant": 9, "bee": 8, "cow": 6}


@pytest.fixture(scope="session")
def plain_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root/<class>/<k>.png, all of one colour each; file number n has colour_of(n)."""
    root = tmp_path_factory.mktemp("plain")
    number = 0
    for name, count in SMALL.items():
        for k in range(count):
            write_plain(root / name / f"{k}.png", number)
            number += 1
    return root


@pytest.fixture(scope="session")
def plain_index(plain_root: Path) -> DataIndex:
    """Of the 23: 4 for validation, 2 labelled per class, the rest unlabelled."""
    return index_folder(plain_root, labelled_per_class=2, validation=4, seed=3)
