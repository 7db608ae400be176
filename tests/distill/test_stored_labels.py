import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import ORIGIN, distributions, write

from sbf_dist.distill import pseudo_labels as store
from sbf_dist.distill.stored_labels import StoredLabels, load, read
from sbf_dist.distill.task import full_distributions, stored_targets
from sbf_dist.errors import UserError

HALF = 2**-11  # largest relative error of a float16


def full(stored: StoredLabels, classes: int) -> np.ndarray:
    found = torch.tensor(stored.classes).long(), torch.tensor(stored.probabilities).float()
    return full_distributions(*found, classes).numpy()


@pytest.fixture
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of ten images in three chunks."""
    monkeypatch.setattr(store, "CHUNK_IMAGES", 4)
    write(tmp_path / "store", np.arange(10) * 3, distributions(10, 5))
    return tmp_path / "store"


def refused(folder: Path, *parts: str, origin=ORIGIN):
    with pytest.raises(UserError) as raised:
        load(folder, origin)
    message = str(raised.value)
    assert "\n" not in message
    for part in (str(folder), "pseudo-labels", *parts):
        assert part in message, message


@pytest.mark.parametrize("how", [lambda folder: load(folder, ORIGIN), read])
def test_what_was_written_is_read(complete, how):
    stored = how(complete)
    said = distributions(10, 5)
    assert stored.ids.tolist() == [3 * number for number in range(10)]
    top = -np.sort(-said, axis=1)[:, :3]
    np.testing.assert_allclose(stored.probabilities, top, rtol=HALF)
    np.testing.assert_array_equal(np.take_along_axis(said, stored.classes.astype(int), 1), top)
    assert (stored.predicted == said.argmax(1)).all()
    assert stored.confidence.dtype == np.float32
    assert (stored.agreement == 1).all()
    for name, kind in (("classes", "int16"), ("probabilities", "float16"), ("margin", "float16")):
        assert getattr(stored, name).dtype == kind


def test_rows_are_found_by_id_in_any_order(complete):
    stored = read(complete)
    some = stored.take(np.array([27, 0, 3]))
    assert some.ids.tolist() == [27, 0, 3]
    assert some.classes.tolist() == stored.classes[[9, 0, 1]].tolist()
    with pytest.raises(AssertionError, match="no pseudo-label"):
        stored.take(np.array([4]))
    assert len(stored.take(np.zeros(0, np.int64))) == 0


def test_what_training_reads_is_one_file_that_all_ranks_map(complete):
    stored = load(complete, ORIGIN)
    (mapped,) = complete.glob(store.MAPPED)
    (line,) = [s for s in Path("/proc/self/maps").read_text().splitlines() if str(mapped) in s]
    start, end = (int(address, 16) for address in line.split()[0].split("-"))
    for name, column in stored.columns().items():
        assert start <= column.ctypes.data < end, name
        assert torch.from_numpy(column).data_ptr() == column.ctypes.data
    before = mapped.stat()
    load(complete, ORIGIN)
    assert mapped.stat().st_ino == before.st_ino


def test_batches_are_joined_with_the_mapped_columns_as_they_are(complete):
    stored = load(complete, ORIGIN)
    columns = (stored.ids, stored.classes, stored.probabilities)
    join = stored_targets(*(torch.from_numpy(column) for column in columns), num_classes=5)
    teacher = join({"id": torch.tensor([27, 0])})["teacher"]
    assert teacher.dtype == torch.float32
    np.testing.assert_array_equal(teacher.numpy(), full(stored, 5)[[9, 0]])


def test_the_mapped_file_is_of_the_store_that_is_there(complete):
    load(complete, ORIGIN)
    shutil.copy(next(complete.glob(store.MAPPED)), complete / ".mapped-of-another.safetensors")
    origin = ORIGIN | {"data": "other"}
    write(complete, np.arange(10) * 3, distributions(10, 5, seed=1), origin=origin)
    stored = load(complete, origin)
    assert (stored.predicted == distributions(10, 5, seed=1).argmax(1)).all()
    assert len(list(complete.glob(store.MAPPED))) == 1


def test_ranks_that_start_at_once_make_one_mapped_file(complete):
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as ranks:
        found = ranks.map(_images, [complete] * 4)
    assert found == [10] * 4
    assert len(list(complete.glob(".mapped-*"))) == 1


def _images(folder: Path) -> int:
    return len(load(folder, ORIGIN))


def test_only_to_look_nothing_is_written(complete):
    before = sorted(complete.iterdir())
    read(complete)
    assert sorted(complete.iterdir()) == before


@settings(max_examples=20, deadline=None)
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
    write(folder, np.arange(images), said, k)
    stored = read(folder)
    found = full(stored, classes)
    assert found.shape == (images, classes)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(1), 1, atol=2e-3 if k >= classes else 1e-5)
    assert found.sum(1).max() < 1 + 1e-5
    for row, whole, top in zip(found, said, stored.classes, strict=True):
        np.testing.assert_allclose(row[top], whole[top], rtol=2e-3, atol=1e-6)
        rest = np.delete(np.arange(classes), top)
        if len(rest):
            np.testing.assert_allclose(row[rest], whole[rest].sum() / len(rest), atol=2e-3)
            assert whole[rest].max() <= whole[top].min()


def test_a_store_that_is_missing_or_half_finished_is_refused(tmp_path, complete):
    refused(tmp_path / "nowhere", "not complete")
    (complete / "manifest.json").unlink()
    refused(complete, "not complete", "run the stage pseudo-labels")


@pytest.mark.parametrize("key", ["teachers", "data", "temperature", "top_k"])
def test_a_stale_store_is_refused_and_says_what_differs(complete, key):
    refused(complete, "stale", key, repr(ORIGIN[key]), "'new'", origin=ORIGIN | {key: "new"})


@pytest.mark.parametrize("weights", [{"one": "1" * 64, "two": "new"}, {"one": "1" * 64}])
def test_weights_of_a_teacher_that_are_others_are_named(complete, weights):
    now = repr(weights.get("two"))
    refused(complete, "weights of two = '222", now, origin=ORIGIN | {"weights": weights})


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"format": 1}', "\0"])
def test_a_damaged_manifest_is_refused(complete, content):
    (complete / "manifest.json").write_text(content)
    refused(complete, "manifest.json is damaged", "--again pseudo-labels")


def test_another_format_is_refused(complete):
    manifest = json.loads((complete / "manifest.json").read_text())
    (complete / "manifest.json").write_text(json.dumps(manifest | {"format": 3}))
    refused(complete, "format 3", "reads 1 and 2")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_chunk_is_refused_and_named(complete, share):
    path = store.chunk_path(complete, 1)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(complete, path.name, "damaged", "--again pseudo-labels")


def test_a_chunk_of_another_store_is_refused_and_named(complete):
    shutil.copy(store.chunk_path(complete, 0), store.chunk_path(complete, 1))
    refused(complete, "chunk-00001.parquet is damaged (changed since")


def test_a_missing_chunk_is_refused_and_named(complete):
    store.chunk_path(complete, 2).unlink()
    refused(complete, "chunk-00002.parquet is missing")


BEFORE = Path(__file__).parents[1] / "launchers" / "before" / "run" / "pseudo-labels"


def test_the_version_before_noted_no_weights_and_no_agreement(tmp_path):
    folder = shutil.copytree(BEFORE, tmp_path / "before")
    origin = json.loads((folder / "origin.json").read_text()) | {"weights": {"teacher-1": "x"}}
    stored = load(folder, origin)
    assert len(stored) == 1297
    assert stored.agreement is None
    assert stored.probabilities.dtype == np.float32
    two = stored.probabilities[:, 0] - stored.probabilities[:, 1]
    np.testing.assert_array_equal(stored.margin, two)
    refused(folder, "stale", "data", origin=origin | {"data": "new"})


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_truncated_chunk_of_the_version_before_is_refused_and_named(tmp_path, share):
    folder = shutil.copytree(BEFORE, tmp_path / "before")
    path = store.chunk_path(folder, 1)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(folder, path.name, "damaged", origin={})
