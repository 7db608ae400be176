"""Two ranks on two machines that share nothing but a store: caches of their own, one process group.

Only what differs between machines is told apart here: the folder of the cache.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.on_ray.stored_checkpoints import StoredShelf
from sbf_dist.object_storage import ObjectFolder

PROGRAM = """
import json, sys
from contextlib import nullcontext
from pathlib import Path

import torch.distributed as dist

from launchers.on_ray import saving
from launchers.on_ray.stopping import Stopping
from launchers.on_ray.stored_checkpoints import StoredShelf
from sbf_dist.errors import UserError
from sbf_dist.object_storage import ObjectFolder

rank, meeting, address, *steps = sys.argv[1:]
rank = int(rank)
dist.init_process_group(
    "gloo", store=dist.FileStore(meeting, 2), rank=rank, world_size=2
)

def write_rank(engine, own, *, loader_state):
    (own / "ranks").mkdir(parents=True)
    (own / "ranks" / f"{rank:05d}.json").write_text(json.dumps(loader_state))

saving.checkpoint.write_rank = write_rank
shelf = StoredShelf(ObjectFolder.at(address), "student")
said = {}
try:
    with saving.Saving(shelf, Stopping(nullcontext(lambda: False), 60, Path("/nowhere"))) as one:
        if one.resume is not None:
            files = sorted(path.name for path in one.resume.rglob("*.json"))
            said["resumed"] = [str(one.resume), files]
        for step in map(int, steps):
            one.save(None, step=step, loader_state={}, digests={"training": "student"})
            one.wait()
except UserError as error:
    said["error"] = str(error)
print(json.dumps(said))
"""


@pytest.fixture
def store(s3) -> ObjectFolder:
    return ObjectFolder.at(f"{s3.bucket}/runs/x/checkpoints/distill")


def both(tmp_path: Path, store: ObjectFolder, *steps: int) -> list[dict]:
    """Let both ranks go on from what is there and save steps; what each says of it."""
    meeting = tmp_path / "-".join(["meeting", *map(str, steps)])
    started = []
    for rank in range(2):
        environment = {**os.environ, "SBF_DIST_CACHE": str(tmp_path / f"machine-{rank}")}
        arguments = [str(rank), str(meeting), store.address, *map(str, steps)]
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    answers = []
    for process in started:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        answers.append(json.loads(out))
    return answers


def test_each_machine_has_the_whole_checkpoint_and_a_refusal_on_one_ends_both_alike(
    faulty_s3, store: ObjectFolder, tmp_path: Path
) -> None:
    assert both(tmp_path, store, 10) == [{}, {}]
    (name,) = StoredShelf(store, "student").names()
    assert {key.removeprefix(f"{name}/") for key in store.objects()} == {
        "manifest.json",
        "ranks/00000.json",
        "ranks/00001.json",
    }
    faulty_s3.add("P.*/ranks/00001", "refuse")
    answers = both(tmp_path, store, 20)
    for rank, answer in enumerate(answers):
        where, files = answer["resumed"]
        assert where.startswith(str(tmp_path / f"machine-{rank}"))
        assert files == ["00000.json", "00001.json", "manifest.json"]
    assert answers[0]["error"] == answers[1]["error"]
    assert "access is denied" in answers[0]["error"]
    assert f"(the one before, {name}, is whole)" in answers[0]["error"]
    assert StoredShelf(store, "student").names() == {name}
