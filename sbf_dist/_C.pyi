# ruff: noqa: N999 -- an extension's customary name
from typing import TypedDict

class BuildInfo(TypedDict):
    cuda: bool
    cuda_archs: str
    compiler: str
    torch: str
    cpu_lanes: int

MIXED_IN_TILES: int

def build_info() -> BuildInfo: ...
