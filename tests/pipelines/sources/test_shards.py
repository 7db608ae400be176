import hashlib
import io
import tarfile

import numpy as np
import pytest
from archive_makers import jpeg
from hypothesis import given
from hypothesis import strategies as st
from nvidia import dali
from nvidia.dali.pipeline import Pipeline

from pipelines.sources.shards import shuffled_runs, write_shard

SAMPLES = [(f"train/c{k % 3}/{k}.JPEG", k % 3, jpeg(k)) for k in range(7)]


def test_a_shard_is_a_tar_file_whose_images_are_where_the_offsets_say(tmp_path):
    shard = write_shard(tmp_path / "x.tar", SAMPLES)
    data = (tmp_path / "x.tar").read_bytes()
    assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    for (_, _, image), offset in zip(SAMPLES, shard.offsets, strict=True):
        assert data[offset : offset + len(image)] == image
    with tarfile.open(tmp_path / "x.tar") as file:
        content = {info.name: file.extractfile(info).read() for info in file}
    expected = {}
    for name, label, image in SAMPLES:
        expected |= {name: image, name.replace(".JPEG", ".cls"): str(label).encode()}
    assert content == expected


def test_a_shard_depends_on_its_samples_alone(tmp_path):
    one = write_shard(tmp_path / "x.tar", SAMPLES)
    other = write_shard(tmp_path / "y.tar", iter(SAMPLES))
    assert one == other
    assert write_shard(tmp_path / "z.tar", SAMPLES[1:]).sha256 != one.sha256


def test_dali_reads_a_shard_by_its_index(tmp_path):
    shard = write_shard(tmp_path / "x.tar", SAMPLES)
    (tmp_path / "x.idx").write_text(shard.index)
    pipe = Pipeline(len(SAMPLES), 1, None)
    with pipe:
        pipe.set_outputs(
            *dali.fn.readers.webdataset(
                paths=[str(tmp_path / "x.tar")],
                index_paths=[str(tmp_path / "x.idx")],
                ext=["JPEG", "cls"],
            )
        )
    pipe.build()
    images, labels = pipe.run()
    for k, (_, label, image) in enumerate(SAMPLES):
        assert np.array(images[k]).tobytes() == image
        assert np.array(labels[k]).tobytes() == str(label).encode()


def test_a_name_too_long_for_a_shard_is_not_cut(tmp_path):
    with pytest.raises(ValueError, match="name is too long"):
        write_shard(tmp_path / "x.tar", [("train/" + 300 * "x" + ".png", 0, b"")])


@given(
    st.lists(st.integers(0, 5000), max_size=60),
    st.integers(1, 9),
    st.integers(1, 20000),
    st.integers(0, 3),
)
def test_shards_hold_every_sample_once_and_are_bounded(sizes, most_samples, most_bytes, seed):
    rows = np.arange(len(sizes)) + 0
    sizes = np.array(sizes, dtype=np.int64)
    bounds = {"most_samples": most_samples, "most_bytes": most_bytes}
    runs = shuffled_runs(sizes, rows, seed=seed, **bounds)
    assert sorted(np.concatenate(runs)) == list(rows) if len(rows) else runs == []
    for run in runs:
        assert 1 <= len(run) <= most_samples
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row in run:
                for size in (sizes[row], 1):
                    info = tarfile.TarInfo("x")
                    info.size = int(size)
                    tar.addfile(info, io.BytesIO(b"0" * size))
            filled = tar.offset  # without the two blocks and the padding at the end
        assert len(run) == 1 or filled <= most_bytes
    again = shuffled_runs(sizes, rows, seed=seed, **bounds)
    assert all(map(np.array_equal, runs, again))


def test_classes_are_mixed_in_shards_and_the_seed_decides_how():
    rows = np.arange(1000)  # 10 classes, one after the other
    sizes = np.full(1000, 1000)
    runs = shuffled_runs(sizes, rows, seed=0, most_samples=100)
    assert len(runs) == 10
    assert all(len(set(run // 100)) >= 8 for run in runs)
    other = shuffled_runs(sizes, rows, seed=1, most_samples=100)
    assert not np.array_equal(runs[0], other[0])
