"""Builds sbf_dist._C for the GPU at hand in a folder of its own, so the checkout is not touched.

    python benchmarks/gpu_build.py FOLDER

Needs torch (2.11 or later), pybind11, setuptools and nvcc. With FOLDER on PYTHONPATH, `import
sbf_dist` is what was built.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def build(folder: Path) -> None:
    """Build sbf_dist._C for the device at hand in `folder`, a copy of what the build needs."""
    for part in ("csrc", "sbf_dist"):
        shutil.copytree(
            ROOT / part,
            folder / part,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("*.so", "__pycache__"),
        )
    # Without pyproject.toml, an old setuptools will do.
    shutil.copy(ROOT / "setup.py", folder)
    major, minor = torch.cuda.get_device_capability()
    environment = os.environ | {
        "SBF_DIST_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "MAX_JOBS": str(os.cpu_count() or 1),
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\nthe build failed: {' '.join(command)} in {folder}")


def require_device(program: str) -> None:
    """Exit with 2 and one line where PyTorch finds no CUDA device."""
    if not torch.cuda.is_available():
        print(f"{program} needs a CUDA device, and PyTorch finds none", file=sys.stderr)
        sys.exit(2)


def main() -> int:
    """Build in the folder that is given."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python benchmarks/gpu_build.py FOLDER", file=sys.stderr)
        return 2
    require_device("benchmarks/gpu_build.py")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    build(folder)
    print(f"built in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
