"""A list as long as ImageNet's: 1.28 million names, of which the first batches' files exist."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import smooth_picture

from pipelines.index import DataIndex
from pipelines.order import SampleStream

IMAGES = 1_281_167
BATCH = 64
SEED = 3
SIDE = 250
LIMIT = 1.5e9

FIRST_BATCH = f"""
import json, sys
from pathlib import Path
from tests.peak_memory import peak_resident
from pipelines.index import DataIndex
from pipelines.loader import TrainLoader
from pipelines.reader import Reader
from sbf_dist.settings import Augmentation, View

index = DataIndex.load(Path(sys.argv[1]))
loader = TrainLoader(
    index, ["labelled"], Reader(threads=2), batch_size={BATCH},
    view=View(image_size=224, mean=(0.5,) * 3, std=(0.2,) * 3), augmentation=Augmentation(),
    seed={SEED},
)
batches = [next(loader) for _ in range(2)]
print(json.dumps({{
    "ids": [int(i) for batch in batches for i in batch["id"]],
    "labels": [int(i) for batch in batches for i in batch["label"]],
    "mean": float(batches[0]["image"].mean()),
    "digest": index.digest,
    "resident": peak_resident(),
}}))
"""


@pytest.fixture(scope="module")
def long_index(tmp_path_factory) -> DataIndex:
    root = tmp_path_factory.mktemp("long")
    numbers = np.arange(IMAGES)
    none = numbers[:0]
    index = DataIndex(
        root=root,
        classes=[f"n{k:08}" for k in range(1000)],
        files=[f"train/n{k // 1300:08}/n{k // 1300:08}_{k % 1300:05}.JPEG" for k in range(IMAGES)],
        labels=numbers // 1300,
        sizes=np.full((IMAGES, 2), SIDE),
        file_bytes=np.full(IMAGES, 20_000),
        parts={"labelled": numbers, "unlabelled": none, "validation": none},
        skipped=[],
    )
    picture = smooth_picture(SIDE, SIDE)
    # Two batches, and the two that are in flight behind them.
    for name in index.take_files(SampleStream(numbers, SEED).take(0, 4 * BATCH)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / name, "JPEG")
    return index


def test_its_first_batches_come_in_their_order_and_memory_stays_small(long_index, tmp_path):
    long_index.save(tmp_path)
    process = subprocess.run(
        [sys.executable, "-c", FIRST_BATCH, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(process.stdout.splitlines()[-1])
    expected = SampleStream(long_index.parts["labelled"], SEED).take(0, 2 * BATCH)
    assert seen["ids"] == expected.tolist()
    assert seen["labels"] == long_index.labels[expected].tolist()
    assert seen["digest"] == long_index.digest
    assert np.isfinite(seen["mean"])
    assert seen["resident"] < LIMIT, f"{seen['resident'] / 1e9:.2f} GB"


def test_every_epoch_of_it_is_a_permutation_that_ranks_agree_on(long_index):
    ids = long_index.parts["labelled"]
    one, other = (SampleStream(ids, SEED) for _ in range(2))
    assert np.array_equal(np.sort(one.epoch(5)), ids)
    middle = 5 * IMAGES + 1000
    assert np.array_equal(other.take(middle, 500), one.epoch(5)[1000:1500])


def test_a_copy_with_other_parts_shares_its_names(long_index):
    none = long_index.parts["unlabelled"]
    fewer = dataclasses.replace(
        long_index, parts={"labelled": none, "unlabelled": none, "validation": np.arange(10)}
    )
    assert fewer.files.column is long_index.files.column
    assert fewer.digest != long_index.digest
