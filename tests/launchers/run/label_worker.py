"""A worker that labels slowly, for test_labelling.py. Ray's workers import this file."""

import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launchers.run import labelling
from sbf_dist.distill import pseudo_labels

CHUNK_IMAGES = 4
PAUSE = 0.25  # seconds that each chunk takes


def write_slowly(config: dict[str, Any]) -> dict[str, Any]:
    """Label in small chunks; each process notes the numbers of those that it is about to write."""
    diary = Path(config["diary"], f"{dist.get_rank()}-{os.getpid()}")
    write_chunk = pseudo_labels.write_chunk

    def write_noted(folder: Path, number: int, *content: Any) -> None:
        with diary.open("a") as file:
            print(number, file=file)
        time.sleep(PAUSE)
        write_chunk(folder, number, *content)

    pseudo_labels.CHUNK_IMAGES = CHUNK_IMAGES
    pseudo_labels.write_chunk = write_noted
    return labelling.write_pseudo_labels(config)
