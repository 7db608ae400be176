import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from pipelines.agreement import check_workers_agree
from pipelines.index import DataIndex
from pipelines.sources.folder import index_folder
from sbf_dist.errors import UserError

WORKER = """
import sys
from pathlib import Path
import torch.distributed as dist
from pipelines.agreement import check_workers_agree
from pipelines.index import DataIndex
from sbf_dist.errors import UserError

rank, meeting, *folders = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=2)
try:
    check_workers_agree(DataIndex.load(Path(folders[int(rank)])))
    print("agreed")
except UserError as error:
    print(error)
"""


def two_workers(tmp_path: Path, *folders: Path) -> list[str]:
    """What each of two workers says, whose indexes lie in these folders."""
    meeting = tmp_path / "meeting"
    meeting.unlink(missing_ok=True)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(meeting), *map(str, folders)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [worker.communicate()[0].strip() for worker in workers]


def test_a_class_folder_that_differs_is_reported_by_every_worker(plain_root, plain_index, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(plain_root, copy)
    (copy / "cow").rename(copy / "dog")
    other = index_folder(copy, labelled_per_class=2, validation=4, seed=3)
    plain_index.save(tmp_path / "one")
    other.save(tmp_path / "other")
    for said in two_workers(tmp_path, tmp_path / "one", tmp_path / "other"):
        assert "worker 1 has another index than worker 0" in said
        assert "\n" not in said


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_worker_whose_files_are_missing_is_named(alone, plain_root, plain_index, tmp_path):
    check_workers_agree(plain_index)
    copy = tmp_path / "copy"
    shutil.copytree(plain_root, copy)
    elsewhere = dataclasses.replace(plain_index, root=copy)
    check_workers_agree(elsewhere)
    shutil.rmtree(copy / "bee")
    with pytest.raises(UserError, match="on worker 0, 8 of 23 checked files are miss"):
        check_workers_agree(elsewhere)


def test_shards_are_looked_at_too(alone, plain_index, tmp_path):
    count = len(plain_index)
    size = int(plain_index.file_bytes.sum())
    offset = plain_index.file_bytes.cumsum() - plain_index.file_bytes
    index: DataIndex = dataclasses.replace(
        plain_index, root=tmp_path, shards=["a.tar"], shard=offset * 0, offset=offset
    )
    (tmp_path / "a.tar").write_bytes(b"x" * size)
    check_workers_agree(index)
    (tmp_path / "a.tar").write_bytes(b"x" * (size - 1))
    with pytest.raises(UserError, match=f"on worker 0, 1 of {count} checked files"):
        check_workers_agree(index)
