"""What the CUDA kernels do, run on the host under sanitizers of addresses and behaviour."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "g++")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}")
    target = tmp_path_factory.mktemp("blocks") / "blocks"
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    subprocess.run(
        [
            COMPILER,
            "-std=c++20",
            "-O1",
            "-g",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unknown-pragmas",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
            f"-I{ROOT / 'csrc'}",
            *includes,
            str(ROOT / "tests" / "csrc" / "blocks.cpp"),
            "-o",
            str(target),
        ],
        check=True,
    )
    return target


@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_threads_compute_what_plain_loops_do(program, seed):
    done = subprocess.run(
        [program, str(seed), "20"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(part.split("=") for part in done.stdout.split())
    # Every kernel in every layout and dtype was run, and most problems had a tile.
    kernels = {
        f"{kernel}/{layout}/{dtype}"
        for kernel in ("forward", "backward", "transforms")
        for layout in ("contiguous", "channels_last")
        for dtype in ("float", "half", "bfloat16", "double")
    }
    assert kernels <= counts.keys()
    assert int(counts.get("no-tile", 0)) < 0.25 * 20 * 4 * 3
