"""Time and memory until the first batch out of a list as long as ImageNet's."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from pipelines.index import DataIndex
from pipelines.loader import TrainLoader
from pipelines.order import SampleStream
from pipelines.reader import Reader
from sbf_dist.settings import Augmentation, View

NAMES = 1_281_167
BATCH = 64
SIZE = (500, 375)
SEED = 1


def write_index(root: Path, folder: Path, picture: bytes) -> None:
    """An index whose files do not exist, but for those that the first batches ask for."""
    numbers = np.arange(NAMES)
    index = DataIndex(
        root=root,
        classes=[f"n{k:08}" for k in range(1000)],
        files=[f"train/n{k // 1300:08}/n{k // 1300:08}_{k % 1300:05}.JPEG" for k in range(NAMES)],
        labels=numbers // 1300,
        sizes=np.full((NAMES, 2), SIZE[::-1]),
        file_bytes=np.full(NAMES, len(picture)),
        parts={"labelled": numbers, "unlabelled": numbers[:0], "validation": numbers[:0]},
        skipped=[],
    )
    for name in index.take_files(SampleStream(numbers, SEED).take(0, 4 * BATCH)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture)
    index.save(folder)


def measure(folder: Path, picture: bytes) -> dict[str, float]:
    """Medians of three processes; the clock starts when their imports are done."""
    write_index(folder / "images", folder / "index", picture)
    runs = []
    for _ in range(3):
        command = [sys.executable, __file__, str(folder / "index")]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        runs.append(json.loads(output.splitlines()[-1]))
    return {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}


def first_batch(folder: Path) -> dict[str, float]:
    start, spent = time.perf_counter(), time.process_time()
    index = DataIndex.load(folder)
    loaded = time.perf_counter() - start
    loader = TrainLoader(
        index,
        ["labelled"],
        Reader(threads=2),
        batch_size=BATCH,
        view=View(image_size=224, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)),
        augmentation=Augmentation(),
        seed=SEED,
    )
    next(loader)
    return {
        "index_s": loaded,
        "first_batch_s": time.perf_counter() - start,
        "first_batch_cpu_s": time.process_time() - spent,
        "resident_gb": _peak_resident() / 1e9,
    }


def _peak_resident() -> int:
    """Bytes of this program's own peak; getrusage also remembers the process that started it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


if __name__ == "__main__":
    print(json.dumps(first_batch(Path(sys.argv[1]))))
