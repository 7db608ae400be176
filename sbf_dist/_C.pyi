# ruff: noqa: N999 -- an extension's customary name
from typing import TypedDict

class BuildInfo(TypedDict):
    cuda: bool
    cuda_archs: str
    compiler: str
    torch: str
    cpu_lanes: int

MAX_TILE_MULTIPLY_ADDS: int

def build_info() -> BuildInfo: ...
