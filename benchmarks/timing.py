"""Fair timing of several callables beside each other on a shared CPU."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

# glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def pin_malloc() -> None:
    """Make glibc keep the memory that is freed.

    Otherwise large outputs are mapped and unmapped in every call, and page faults, which depend on
    what ran before, are timed instead of arithmetic. Raises RuntimeError where glibc refuses, and
    OSError where there is no glibc.
    """
    libc = ctypes.CDLL("libc.so.6")
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
        if libc.mallopt(option, value) != 1:
            raise RuntimeError(f"mallopt({option}, {value}) failed")


def interleaved_medians(
    calls: dict[str, Callable[[], object]], *, rounds: int, repeats: int
) -> dict[str, float]:
    """Return the median milliseconds of each call.

    In each round every call has its turn, so that a change of the machine's speed meets all alike.
    A turn is a pause, in which the threads of the engine before stop spinning, two calls that are
    not timed and `repeats` that are.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.02)
            call()
            call()
            for _ in range(repeats):
                start = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> str:
    """Name the processor and its vector instructions."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    name = ", ".join(sorted(names)) or platform.processor()
    return f"{platform.machine()}, {name}, {torch.backends.cpu.get_cpu_capability()}"
