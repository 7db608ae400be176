"""DeepSpeed imported without what it loads and builds on the side.

Three things, none of which a setting of DeepSpeed or torch turns off while DeepSpeed is imported
alone (TORCH_COMPILE_DISABLE would hold for the user's own networks as well). Seconds of one core in
each worker, with DeepSpeed 0.19.8 and torch 2.14:

    MLflow     its autotuner imports MLflow if it can; nothing is autotuned here            1.3 s
    Muon       an optimizer that it imports at the first step whatever the optimizer is:
               its functions are compiled, for which torch loads a part of its compiler     1.1 s
    operators  on the CPU it compiles a shared-memory all-reduce at the very first start,
               with ninja and a C++ compiler; gloo does the same                           57 s

Another version than the one that this was written for is imported as it is: the results are the
same, only later.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from typing import Any

WRITTEN_FOR = "0.19"


def load_deepspeed(device_type: str) -> ModuleType:
    """Import DeepSpeed for "cpu" or "cuda"."""
    if not is_known_version(metadata.version("deepspeed")):
        return importlib.import_module("deepspeed")
    with _unimportable("mlflow"):
        deepspeed = importlib.import_module("deepspeed")
    with _uncompiled(importlib.import_module("deepspeed.runtime.compiler")):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    if device_type == "cpu":
        operators = importlib.import_module("deepspeed.ops.op_builder.all_ops").ALL_OPS
        deepspeed.ops.__compatible_ops__ = dict.fromkeys(operators, False)
    return deepspeed


def is_known_version(version: str) -> bool:
    """Whether this file was written for `version`, as far as its first two numbers go."""
    return version.split(".")[:2] == WRITTEN_FOR.split(".")


@contextmanager
def _unimportable(name: str) -> Iterator[None]:
    """Let `import name` fail for a while, unless the module is loaded already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _uncompiled(compiler: ModuleType) -> Iterator[None]:
    """Let DeepSpeed's decorator @compile() leave functions as they are for a while."""
    compile_of_deepspeed = compiler.compile
    compiler.compile = _identity  # type: ignore[attr-defined]
    try:
        yield
    finally:
        compiler.compile = compile_of_deepspeed  # type: ignore[attr-defined]


def _identity() -> Callable[[Any], Any]:
    return lambda function: function
