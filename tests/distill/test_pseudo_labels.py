import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import ORIGIN, TEACHERS, distributions, summary, write

from sbf_dist import recipe
from sbf_dist.distill import pseudo_labels as store
from sbf_dist.distill.stored_labels import read


@pytest.fixture
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of ten images in three chunks."""
    monkeypatch.setattr(store, "CHUNK_IMAGES", 4)
    write(tmp_path / "store", np.arange(10) * 3, distributions(10, 5))
    return tmp_path / "store"


@given(st.integers(0, 50), st.integers(1, 9))
def test_chunks_cut_the_ids_whoever_writes_them(images, chunk):
    ids = np.arange(images) * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_IMAGES", chunk)
        parts = store.chunks(ids)
    assert [i for part in parts for i in part.tolist()] == ids.tolist()
    assert all(len(part) == chunk for part in parts[:-1])
    assert all(0 < len(part) <= chunk for part in parts)


def test_a_chunk_is_plain_parquet_with_small_types(complete):
    table = pq.read_table(store.chunk_path(complete, 0))
    assert {field.name: str(field.type) for field in table.schema} == {
        "id": "int64",
        "classes": "fixed_size_list<element: int16>[3]",
        "probabilities": "fixed_size_list<element: halffloat>[3]",
        "entropy": "halffloat",
        "margin": "halffloat",
        "agreement": "float",
    }


def test_a_thousand_classes_take_less_than_42_bytes_an_image(tmp_path):
    said = distributions(1024, 1000)
    store.write_chunk(tmp_path, 0, np.arange(1024), summary(said, 10))
    assert store.chunk_path(tmp_path, 0).stat().st_size < 42 * 1024


def test_classes_beyond_int16_are_kept(tmp_path):
    said = np.zeros((1, 40_000), np.float32)
    said[0, 39_999] = 1
    write(tmp_path, np.arange(1), said)
    assert read(tmp_path).classes[0, 0] == 39_999


def test_a_stopped_job_goes_on_with_the_chunks_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_IMAGES", 4)
    ids, said = np.arange(10), distributions(10, 5)
    store.begin(tmp_path, ORIGIN)
    store.write_chunk(tmp_path, 1, ids[4:8], summary(said[4:8]))
    before = store.chunk_path(tmp_path, 1).stat()
    store.begin(tmp_path, ORIGIN)
    after = store.chunk_path(tmp_path, 1).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert store.missing(tmp_path, 3) == [0, 2]
    with pytest.raises(AssertionError, match=r"chunks \[0, 2\]"):
        store.finish(tmp_path, ids, classes=[], teachers=[])
    for number in (0, 2):
        rows = slice(4 * number, 4 * number + 4)
        store.write_chunk(tmp_path, number, ids[rows], summary(said[rows]))
    store.finish(tmp_path, ids, classes=[], teachers=[])
    assert read(tmp_path).ids.tolist() == list(range(10))


@pytest.mark.parametrize("key", list(ORIGIN))
def test_a_store_of_another_origin_is_begun_anew(complete, key):
    (complete / "temperatures.json").write_text("{}")
    store.begin(complete, ORIGIN | {key: "other"})
    assert [path.name for path in complete.iterdir()] == ["origin.json"]


def test_a_damaged_origin_is_another_origin(complete):
    (complete / "origin.json").write_text('{"teach')
    store.begin(complete, ORIGIN)
    assert not list(complete.glob("chunk-*"))
    assert json.loads((complete / "origin.json").read_text()) == ORIGIN


def test_the_manifest_says_what_is_in_the_store(complete):
    manifest = json.loads((complete / "manifest.json").read_text())
    assert manifest["images"] == 10
    assert manifest["origin"] == ORIGIN
    assert manifest["teachers"] == TEACHERS
    assert manifest["classes"] == [f"class-{number}" for number in range(5)]
    assert len(manifest["chunks"]) == 3


def test_nothing_half_written_is_left(complete):
    assert sorted(path.name for path in complete.iterdir()) == [
        "chunk-00000.parquet",
        "chunk-00001.parquet",
        "chunk-00002.parquet",
        "manifest.json",
        "origin.json",
    ]


RECIPE = Path(__file__).parents[2] / "recipes" / "digits.yaml"


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("teachers.0.training.optimizer.lr=0.3", {"teachers"}),
        ("teachers.1.weight=2", {"teachers"}),
        ("seed=1", {"teachers"}),
        ("pseudo_labels.temperature=2", {"temperature"}),
        ("pseudo_labels.top_k=3", {"top_k"}),
        ("distill.label_weight=2", set()),
        ("workers.count=1", set()),
        ("pseudo_labels.threshold=0.5", set()),
        ("pseudo_labels.sharpening=0.5", set()),
    ],
)
def test_the_origin_changes_with_what_the_teachers_word_depends_on(override, changed):
    before = store.origin(recipe.load(RECIPE), "data", {})
    after = store.origin(recipe.load(RECIPE, [override]), "data", {})
    assert {key for key in before if before[key] != after[key]} == changed


def test_the_origin_changes_with_the_data_and_the_weights():
    loaded = recipe.load(RECIPE)
    assert store.origin(loaded, "one", {}) != store.origin(loaded, "other", {})
    assert store.origin(loaded, "one", {"a": "1"}) != store.origin(loaded, "one", {"a": "2"})
