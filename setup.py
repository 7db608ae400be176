"""Builds sbf_dist._C; everything else about the package stands in pyproject.toml.

SBF_DIST_CUDA=0 leaves CUDA out; SBF_DIST_CUDA=1 makes a CUDA that cannot be built an error;
unset, CUDA is built where it can be. TORCH_CUDA_ARCH_LIST chooses the GPUs.
"""

import os
import re
import subprocess
from pathlib import Path

import torch
from setuptools import find_packages, setup
from torch.utils import cpp_extension

CUDA_ARCHS = "8.0;9.0+PTX"
# The CPU kernels are compiled for several instruction sets, of which one is chosen when they run:
# so no -march here.
CXX = ["-O3", "-std=c++20", "-fopenmp", "-Wall", "-Wno-unknown-pragmas"]


class NoCudaError(Exception):
    """CUDA cannot be built, or is not wanted; the message says why."""


def run(*command: str | Path) -> str:
    """Run a command and return all that it prints."""
    done = subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.stdout


def cuda_libraries() -> Path:
    """Find the folder that holds libcudart.so of the toolkit that PyTorch can use."""
    if os.environ.get("SBF_DIST_CUDA") == "0":
        raise NoCudaError("SBF_DIST_CUDA=0")
    if torch.version.cuda is None:
        raise NoCudaError(f"PyTorch {torch.__version__} is built without CUDA")
    if cpp_extension.CUDA_HOME is None:
        raise NoCudaError("nvcc is not found: put it on the PATH or set CUDA_HOME")
    nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
    if not nvcc.exists():
        raise NoCudaError(f"{nvcc} does not exist: set CUDA_HOME")
    release = re.search(r"release (\d+)\.(\d+)", run(nvcc, "--version"))
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        raise NoCudaError(f"{nvcc} is not CUDA {torch.version.cuda}, as PyTorch is")
    # nvcc may be a wrapper: its dry run prints where the toolkit is.
    top = re.search(r"^#\$ TOP=(.+)$", run(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    root = Path(top[1]) if top else Path(cpp_extension.CUDA_HOME)
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (root / folder / "libcudart.so").exists():
            return (root / folder).resolve()
    raise NoCudaError(f"libcudart.so is not found in {root.resolve()}: install it or set CUDA_HOME")


def extension():
    """Describe sbf_dist._C, with CUDA or without."""
    wanted = os.environ.get("SBF_DIST_CUDA")
    if wanted not in (None, "0", "1"):
        raise SystemExit(f"SBF_DIST_CUDA is {wanted!r}: it must be 0, 1 or unset")
    sources = [str(source) for source in sorted(Path("csrc").glob("*.cpp"))]
    cuda_sources = [str(source) for source in sorted(Path("csrc").glob("*.cu"))]
    depends = [str(header) for header in sorted(Path("csrc").glob("*.h"))]
    try:
        libraries = cuda_libraries()
    except NoCudaError as reason:
        if wanted == "1":
            raise SystemExit(f"SBF_DIST_CUDA=1, but CUDA cannot be built: {reason}") from None
        print(f"sbf_dist: building for the CPU only ({reason})", flush=True)
        return cpp_extension.CppExtension(
            "sbf_dist._C",
            sources,
            depends=depends,
            extra_compile_args={"cxx": CXX},
            extra_link_args=["-fopenmp"],
        )
    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    print(f"sbf_dist: building for the CPU and CUDA {torch.version.cuda} ({archs})", flush=True)
    return cpp_extension.CUDAExtension(
        "sbf_dist._C",
        [*sources, *cuda_sources],
        depends=depends,
        define_macros=[("WITH_CUDA", None), ("SBF_CUDA_ARCHS", f'"{archs}"')],
        library_dirs=[str(libraries)],
        extra_compile_args={"cxx": CXX, "nvcc": ["-O3", "-std=c++20", "--threads=2"]},
        extra_link_args=["-fopenmp"],
    )


setup(
    packages=find_packages(include=["sbf_dist*", "pipelines*", "launchers*"]),
    package_data={"sbf_dist": ["py.typed", "report/page/*"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
