import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbf_dist import recipe
from sbf_dist.distill import pseudo_labels as store
from sbf_dist.distill.task import full_distributions
from sbf_dist.errors import UserError
from sbf_dist.settings import PseudoLabels

ORIGIN = {"teachers": "t" * 64, "data": "d" * 64, "temperature": 1.5, "top_k": 3}


def distributions(images, classes, seed=0):
    logits = np.random.default_rng(seed).normal(0, 3, (images, classes))
    raw = np.exp(logits)
    return (raw / raw.sum(1, keepdims=True)).astype(np.float32)


def full(read: store.StoredLabels, classes: int) -> np.ndarray:
    stored = torch.tensor(read.classes), torch.tensor(read.probabilities)
    return full_distributions(*stored, classes).numpy()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(store, "CHUNK_IMAGES", 4)


def write(folder: Path, ids, said, k=3, origin=ORIGIN):
    """Write a whole store; images in the given order."""
    store.begin(folder, origin)
    order = np.argsort(ids)
    for number, part in enumerate(store.chunks(ids[order])):
        rows = [int(np.flatnonzero(ids == i)[0]) for i in part]
        store.write_chunk(folder, number, part, said[rows], PseudoLabels(top_k=k))
    store.finish(folder, np.sort(ids))


@pytest.fixture
def complete(tmp_path: Path, small_chunks):
    """A store of ten images in three chunks."""
    ids = np.arange(10) * 3
    write(tmp_path / "store", ids, distributions(10, 5))
    return tmp_path / "store"


def refused(folder: Path, *parts: str, origin=ORIGIN):
    with pytest.raises(UserError) as raised:
        store.load(folder, origin)
    message = str(raised.value)
    assert "\n" not in message
    for part in (str(folder), "pseudo-labels", *parts):
        assert part in message, message


def test_what_was_written_is_read_by_ascending_id(tmp_path, small_chunks):
    ids = np.array([7, 3, 100, 0, 12, 5])
    said = distributions(6, 5)
    write(tmp_path, ids, said)
    read = store.load(tmp_path, ORIGIN)
    assert read.ids.tolist() == [0, 3, 5, 7, 12, 100]
    said = said[np.argsort(ids)]
    top = np.sort(said, axis=1)[:, ::-1][:, :3]
    np.testing.assert_array_equal(read.probabilities, top)
    np.testing.assert_array_equal(np.take_along_axis(said, read.classes, 1), top)
    assert read.classes.dtype == np.int64
    np.testing.assert_allclose(read.entropy, scipy.stats.entropy(said, axis=1), rtol=1e-5)


def test_images_of_a_chunk_may_come_in_any_order(tmp_path):
    store.begin(tmp_path, ORIGIN)
    said = distributions(3, 4)
    store.write_chunk(tmp_path, 0, np.array([9, 2, 5]), said, PseudoLabels(top_k=4))
    store.finish(tmp_path, np.array([2, 5, 9]))
    read = store.load(tmp_path, ORIGIN)
    assert read.ids.tolist() == [2, 5, 9]
    np.testing.assert_array_equal(full(read, 4), said[[1, 2, 0]])
    np.testing.assert_allclose(read.entropy, scipy.stats.entropy(said[[1, 2, 0]], axis=1), 1e-5)


def test_certainty_has_no_entropy_and_uniform_has_the_most(tmp_path):
    store.begin(tmp_path, ORIGIN)
    said = np.array([[0, 1, 0, 0], [0.25] * 4], np.float32)
    store.write_chunk(tmp_path, 0, np.array([0, 1]), said, PseudoLabels(top_k=2))
    store.finish(tmp_path, np.arange(2))
    entropy = store.load(tmp_path, ORIGIN).entropy
    np.testing.assert_allclose(entropy, [0, np.log(4)], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    images=st.integers(1, 6),
    classes=st.integers(1, 12),
    k=st.integers(1, 14),
    seed=st.integers(0, 9),
)
def test_full_distributions_keep_what_is_stored_and_share_the_rest_out(
    tmp_path_factory, images, classes, k, seed
):
    folder = tmp_path_factory.mktemp("store")
    said = distributions(images, classes, seed)
    store.begin(folder, ORIGIN)
    store.write_chunk(folder, 0, np.arange(images), said, PseudoLabels(top_k=k))
    store.finish(folder, np.arange(images))
    read = store.load(folder, ORIGIN)
    found = full(read, classes)
    assert found.shape == (images, classes)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    if k >= classes:
        np.testing.assert_array_equal(found, said)
        return
    for row, whole, top in zip(found, said, read.classes, strict=True):
        np.testing.assert_array_equal(row[top], whole[top])
        rest = np.delete(np.arange(classes), top)
        np.testing.assert_allclose(row[rest], whole[rest].sum() / len(rest), atol=1e-6)
        assert whole[rest].max() <= whole[top].min()


@given(st.integers(0, 50), st.integers(1, 9))
def test_chunks_cut_the_ids_whoever_writes_them(images, chunk):
    ids = np.arange(images) * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_IMAGES", chunk)
        parts = store.chunks(ids)
    assert [i for part in parts for i in part.tolist()] == ids.tolist()
    assert all(len(part) == chunk for part in parts[:-1])
    assert all(0 < len(part) <= chunk for part in parts)


def test_a_stopped_job_goes_on_with_the_chunks_that_are_missing(tmp_path, small_chunks):
    ids = np.arange(10)
    said = distributions(10, 5)
    store.begin(tmp_path, ORIGIN)
    store.write_chunk(tmp_path, 1, ids[4:8], said[4:8], PseudoLabels(top_k=3))
    refused(tmp_path, "not complete")
    before = store.chunk_path(tmp_path, 1).stat()
    store.begin(tmp_path, ORIGIN)
    after = store.chunk_path(tmp_path, 1).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    with pytest.raises(AssertionError, match=r"chunks \[0, 2\]"):
        store.finish(tmp_path, ids)
    refused(tmp_path, "not complete")
    for number in (0, 2):
        store.write_chunk(
            tmp_path, number, ids[4 * number :][:4], said[4 * number :][:4], PseudoLabels(top_k=3)
        )
    store.finish(tmp_path, ids)
    assert store.load(tmp_path, ORIGIN).ids.tolist() == list(range(10))


@pytest.mark.parametrize("key", list(ORIGIN))
def test_a_store_of_another_origin_is_begun_anew(complete, key):
    store.begin(complete, ORIGIN | {key: "other"})
    assert not list(complete.glob("chunk-*"))
    refused(complete, "not complete", origin=ORIGIN | {key: "other"})


def test_a_damaged_origin_is_another_origin(complete):
    (complete / "origin.json").write_text('{"teach')
    store.begin(complete, ORIGIN)
    assert not list(complete.glob("chunk-*"))
    assert json.loads((complete / "origin.json").read_text()) == ORIGIN


@pytest.mark.parametrize("key", list(ORIGIN))
def test_a_stale_store_is_refused_and_says_what_differs(complete, key):
    other = ORIGIN | {key: "new"}
    refused(complete, "stale", key, repr(ORIGIN[key]), "'new'", origin=other)


def test_a_store_that_is_missing_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "not complete")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"format": 1}', "\0"])
def test_a_damaged_manifest_is_refused(complete, content):
    (complete / "manifest.json").write_text(content)
    refused(complete, "manifest.json is damaged", "--again pseudo-labels")


def test_another_format_is_refused(complete):
    manifest = json.loads((complete / "manifest.json").read_text())
    (complete / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    refused(complete, "format 2", "reads 1")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_chunk_is_refused_and_named(complete, share):
    path = store.chunk_path(complete, 1)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(complete, path.name, "damaged", "--again pseudo-labels")


def test_a_missing_chunk_is_refused_and_named(complete):
    store.chunk_path(complete, 2).unlink()
    refused(complete, "chunk-00002.parquet is missing")


def test_a_chunk_of_other_length_is_refused(complete):
    shutil.copy(store.chunk_path(complete, 0), store.chunk_path(complete, 2))
    refused(complete, "12 images instead of 10")


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
    ],
)
def test_the_origin_changes_with_what_the_teachers_word_depends_on(override, changed):
    before = store.origin(recipe.load(RECIPE), "data")
    after = store.origin(recipe.load(RECIPE, [override]), "data")
    assert {key for key in before if before[key] != after[key]} == changed


def test_the_origin_changes_with_the_data():
    loaded = recipe.load(RECIPE)
    assert store.origin(loaded, "one") != store.origin(loaded, "other")
