# ruff: noqa: N999 -- an extension's customary name
from typing import TypedDict

class BuildInfo(TypedDict):
    cuda: bool
    cuda_archs: str
    compiler: str
    torch: str

def build_info() -> BuildInfo: ...
