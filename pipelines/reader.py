"""One rank as it reads images: its place among the ranks, and what it reads with."""

from dataclasses import dataclass
from typing import Literal

import torch

from pipelines.remote.shard_cache import ShardCache
from sbf_dist.errors import UserError

DTYPES = ("float32", "float16")
CACHES = ("none", "memory")


@dataclass(frozen=True)
class Reader:
    """What all loaders of one rank have in common.

    rank, world_size   place among the ranks: 0 <= rank < world_size
    threads            DALI's, beside the caller's own
    device             torch device of the batches, "cpu" or "cuda[:n]"
    prefetch           batches in flight
    dtype              of the images, "float32" or "float16"
    cache              of training images: "memory" decodes all of them when the first batch is
                       asked for and keeps their pixels, for small data sets; "none" decodes them
                       each time. Evaluation always decodes
    shard_cache        keeps shards of an object store on this machine's disk; None: images are read
                       one by one
    UserError for a value that does not fit.
    """

    rank: int = 0
    world_size: int = 1
    threads: int = 1
    device: torch.device | str = "cpu"
    prefetch: int = 2
    dtype: Literal["float32", "float16"] = "float32"
    cache: Literal["none", "memory"] = "none"
    shard_cache: ShardCache | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, f"rank {self.rank} of {self.world_size}"
        for name in ("threads", "prefetch"):
            check_count(name, getattr(self, name))
        for name, choices in (("dtype", DTYPES), ("cache", CACHES)):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"{name} {value!r}: must be one of {', '.join(choices)}")

    @property
    def on_cpu(self) -> bool:
        """Whether images are decoded by the CPU alone."""
        return torch.device(self.device).type == "cpu"

    @property
    def device_id(self) -> int | None:
        """The GPU's number for DALI, None for the CPU; UserError for a device that is not there."""
        device = torch.device(self.device)
        if device.type == "cpu":
            return None
        if device.type != "cuda" or not torch.cuda.is_available():
            raise UserError(
                f"device {device}: must be cpu, or cuda where PyTorch sees a CUDA device"
            )
        return torch.cuda.current_device() if device.index is None else device.index


def check_count(name: str, value: int) -> None:
    """UserError for a number below 1."""
    if value < 1:
        raise UserError(f"{name} {value}: must be at least 1")
