import json
import shutil

import numpy as np
import pytest

from pipelines.index import DataIndex
from pipelines.sources.folder import index_folder
from sbf_dist.errors import UserError


def test_an_index_comes_back_as_it_was_saved(plain_index, tmp_path):
    plain_index.save(tmp_path / "index")
    loaded = DataIndex.load(tmp_path / "index")
    assert loaded.digest == plain_index.digest
    assert loaded.root == plain_index.root
    assert loaded.files == plain_index.files
    assert loaded.classes == plain_index.classes
    assert loaded.skipped == plain_index.skipped
    for name in ("labels", "sizes", "file_bytes"):
        assert getattr(loaded, name).dtype == np.int64
        assert np.array_equal(getattr(loaded, name), getattr(plain_index, name)), name
    for part, ids in plain_index.parts.items():
        assert np.array_equal(loaded.parts[part], ids), part


def test_saving_another_index_replaces_the_first_and_leaves_no_rest(
    plain_root, plain_index, tmp_path
):
    other = index_folder(plain_root, labelled_per_class=1, validation=5, seed=4)
    plain_index.save(tmp_path)
    other.save(tmp_path)
    assert DataIndex.load(tmp_path).digest == other.digest != plain_index.digest
    assert len(list(tmp_path.iterdir())) == 2


def test_a_kill_before_the_last_step_leaves_the_old_index(plain_root, plain_index, tmp_path):
    plain_index.save(tmp_path)
    other = index_folder(plain_root, labelled_per_class=1, validation=5, seed=4)
    other.save(tmp_path / "elsewhere")
    for parquet in (tmp_path / "elsewhere").glob("*.parquet"):
        shutil.copy(parquet, tmp_path)
    assert DataIndex.load(tmp_path).digest == plain_index.digest


def test_the_digest_ignores_the_root_and_minds_content_and_parts(plain_root, plain_index, tmp_path):
    copy = tmp_path / "moved"
    shutil.copytree(plain_root, copy)
    assert index_folder(copy, labelled_per_class=2, validation=4, seed=3).digest == (
        plain_index.digest
    )
    other_parts = index_folder(copy, labelled_per_class=3, validation=4, seed=3)
    assert other_parts.digest != plain_index.digest
    (copy / "ant" / "0.png").rename(copy / "ant" / "x.png")
    assert index_folder(copy, labelled_per_class=2, validation=4, seed=3).digest != (
        plain_index.digest
    )


def test_a_missing_file_is_named(plain_index, tmp_path):
    with pytest.raises(UserError, match=r"index\.json is missing"):
        DataIndex.load(tmp_path / "nowhere")
    plain_index.save(tmp_path)
    next(tmp_path.glob("*.parquet")).unlink()
    with pytest.raises(UserError, match="parquet is missing; index the images again"):
        DataIndex.load(tmp_path)


def test_damaged_files_are_refused(plain_index, tmp_path):
    plain_index.save(tmp_path)
    parquet = next(tmp_path.glob("*.parquet"))
    data = parquet.read_bytes()
    parquet.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        DataIndex.load(tmp_path)
    parquet.write_bytes(data)
    about = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(about | {"classes": ["a", "b", "c"]}))
    with pytest.raises(UserError, match="do not belong together"):
        DataIndex.load(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(UserError, match="format 99, this version reads 1"):
        DataIndex.load(tmp_path)
    (tmp_path / "index.json").write_text('{"format": 1')
    with pytest.raises(UserError, match="cannot be read"):
        DataIndex.load(tmp_path)
