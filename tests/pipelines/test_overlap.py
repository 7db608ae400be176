import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from pipelines import overlap
from pipelines.index import DataIndex
from pipelines.overlap import in_validation

CONTENT = [b"one", b"two", b"six", b"four", b"five", b"two", b"one", b"one"]


@pytest.fixture
def index(tmp_path: Path) -> DataIndex:
    """Files of CONTENT, the last three for validation; the picture five is of another size."""
    names = [f"{number}.jpg" for number in range(len(CONTENT))]
    for name, content in zip(names, CONTENT, strict=True):
        (tmp_path / name).write_bytes(content)
    sizes = np.full((len(CONTENT), 2), 7)
    sizes[4] = 9
    return DataIndex(
        root=tmp_path,
        classes=["a"],
        files=names,
        labels=np.zeros(len(CONTENT), np.int64),
        sizes=sizes,
        file_bytes=np.array([len(content) for content in CONTENT]),
        parts={"labelled": np.arange(0), "unlabelled": np.arange(5), "validation": np.arange(5, 8)},
        skipped=[],
    )


def test_the_same_bytes_are_found(index):
    assert in_validation(index, index.parts["unlabelled"], None) == [(0, 6), (1, 5)]
    assert in_validation(index, np.array([2, 3]), None) == []
    assert in_validation(index, np.arange(0), None) == []


def test_only_files_of_a_size_that_validation_images_have_are_read(index, monkeypatch):
    read = []
    monkeypatch.setattr(overlap, "sha256", lambda path: read.append(path.name) or "00" * 32)
    in_validation(index, index.parts["unlabelled"], None)
    assert sorted(read) == ["0.jpg", "1.jpg", "2.jpg", "5.jpg", "6.jpg", "7.jpg"]


def test_what_is_known_of_a_prepared_set_is_not_read(index):
    digests = np.stack(
        [np.frombuffer(hashlib.sha256(content).digest(), np.uint8) for content in CONTENT]
    )
    for number in range(5):
        (index.root / f"{number}.jpg").unlink()
    digests[5:] = 0
    assert in_validation(index, index.parts["unlabelled"], digests) == [(0, 6), (1, 5)]
    nothing = dataclasses.replace(index, parts=index.parts | {"validation": np.arange(0)})
    assert in_validation(nothing, index.parts["unlabelled"], None) == []
