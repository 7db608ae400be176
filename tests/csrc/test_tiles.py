"""What the CPU kernels do, in each instruction set, under sanitizers of addresses and behaviour."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from sbf_dist import _C

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "g++")
SETS = {4: ["generic"], 8: ["generic", "avx2"], 16: ["generic", "avx2", "avx512"]}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}")
    folder = tmp_path_factory.mktemp("tiles")
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags = [
        "-std=c++20",
        "-g1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        *sanitizers,
        f"-I{ROOT / 'csrc'}",
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
    ]
    # Unoptimized, the kernels compile in a sixth of the time, and no load is left out as unused.
    sources = [(path, "-O0") for path in sorted((ROOT / "csrc").glob("tile_*.cpp"))]
    sources.append((ROOT / "tests" / "csrc" / "tiles.cpp", "-O1"))
    objects = [folder / f"{source.stem}.o" for source, _ in sources]
    compilers = [
        subprocess.Popen([COMPILER, level, *flags, "-c", str(source), "-o", str(target)])
        for (source, level), target in zip(sources, objects, strict=True)
    ]
    assert [compiler.wait() for compiler in compilers] == [0] * len(sources)
    target = folder / "program"
    subprocess.run([COMPILER, *sanitizers, *map(str, objects), "-o", str(target)], check=True)
    return target


@pytest.mark.parametrize("seed", range(2))
def test_tiles_hold_what_plain_loops_compute(program, seed):
    done = subprocess.run(
        [program, str(seed), "24"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = {part.split("=")[0] for part in done.stdout.split()}
    for layout in ("contiguous", "channels_last"):
        # At least what this process has chosen: ATEN_CPU_CAPABILITY may keep it from the best.
        for instructions in SETS[_C.build_info()["cpu_lanes"]]:
            assert {
                f"{kernel}/{layout}/{instructions}/{dtype}"
                for kernel in ("expand", "transforms")
                for dtype in ("float", "half", "bfloat16")
            } <= run
            assert {
                f"{kernel}/{layout}/{instructions}" for kernel in ("convolution", "shared")
            } <= run
