"""The compiled extension sbf_dist._C, whose import registers the operators torch.ops.sbf.*."""

import torch

REBUILD = "pip install --no-build-isolation -e . (in the root of the repository)"

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
