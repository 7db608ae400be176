"""The compiled extension sbf_dist._C, whose import registers the operators torch.ops.sbf.*.

It lies beside this file. A copy of the sources without it, which is what a job on a cluster has,
takes the one that SBF_DIST_EXTENSION names: a file that was built from the same csrc/.
"""

import filecmp
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

REBUILD = "pip install --no-build-isolation -e . (in the root of the repository)"
BUILT_ELSEWHERE = "SBF_DIST_EXTENSION"


def load_built(file: Path, sources: Path) -> ModuleType:
    """Load the extension from `file`, built in another checkout, as sbf_dist._C.

    ImportError: there is no such file, or that checkout's csrc/ is not the same as `sources`.
    """
    if not file.is_file():
        raise ImportError(f"{BUILT_ELSEWHERE} = {file}: does not exist")
    theirs = file.parents[1] / "csrc"
    names = sorted({path.name for folder in (theirs, sources) for path in folder.glob("*")})
    _, different, missing = filecmp.cmpfiles(theirs, sources, names, shallow=False)
    if different or missing:
        raise ImportError(
            f"{BUILT_ELSEWHERE} = {file}: was built from another csrc/ than {sources} "
            f"({', '.join([*different, *missing][:3])}); rebuild it where it is: {REBUILD}"
        )
    spec = importlib.util.spec_from_file_location("sbf_dist._C", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sbf_dist._C"] = module
    spec.loader.exec_module(module)
    return module


_elsewhere = os.environ.get(BUILT_ELSEWHERE)
if _elsewhere and not list(Path(__file__).parent.glob("_C.*.so")):
    load_built(Path(_elsewhere), Path(__file__).parents[1] / "csrc")

try:
    from sbf_dist._C import build_info
except ImportError as error:
    raise ImportError(
        "the extension sbf_dist._C is missing, or was built against another PyTorch than "
        f"{torch.__version__}: build it with {REBUILD}"
    ) from error


def check_build(built_against: str, running: str) -> None:
    """Raise ImportError unless both PyTorch versions have the same major and minor number."""
    if built_against.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(
            f"the extension sbf_dist._C was built against PyTorch {built_against}, but this is "
            f"PyTorch {running}: rebuild it with {REBUILD}"
        )


check_build(build_info()["torch"], torch.__version__)
