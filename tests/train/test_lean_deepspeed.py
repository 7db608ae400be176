"""DeepSpeed without what it loads on the side: what is saved, and that nothing else changes."""

import json
import subprocess
import sys
from typing import Any

import pytest

from sbf_dist.train.lean_deepspeed import is_known_version

TRAINING = """
import json, sys
sys.path.insert(0, "tests/train")
import torch
from tiny import TinyLoader, TinyTask
from sbf_dist.settings import Optimizer
from sbf_dist.train import lean_deepspeed
from sbf_dist.train.engine import build_engine
from sbf_dist.train.loop import Every, fit

lean_deepspeed.WRITTEN_FOR = sys.argv[1] or lean_deepspeed.WRITTEN_FOR
if sys.argv[1]:  # the operator takes a minute to compile
    import deepspeed
    deepspeed.ops.__compatible_ops__ = {}
torch_compile = torch.compile
torch.manual_seed(0)
engine = build_engine(TinyTask(), Optimizer(), micro_batch=16)
losses = []
fit(engine, TinyLoader(0, 1), steps=3, lr_at=lambda step: 0.1,
    log=Every(1, lambda record: losses.append(record.parts["loss"])))
loaded = [name for name in ("mlflow", "torch._inductor.compile_fx") if sys.modules.get(name)]
from deepspeed.runtime import compiler
import mlflow
print(json.dumps({
    "losses": losses,
    "weights": [p.double().sum().item() for p in engine.module.parameters()],
    "loaded": loaded,
    "restored": compiler.compile() is torch.compile is torch_compile,
}))
"""


def trained(version: str = "") -> dict[str, Any]:
    """Train in a process of its own, as if lean_deepspeed were written for `version`."""
    process = subprocess.run(
        [sys.executable, "-c", TRAINING, version],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def lean() -> dict[str, Any]:
    return trained()


def test_a_training_loads_neither_mlflow_nor_torchs_compiler(lean):
    assert lean["loaded"] == []


def test_afterwards_all_is_as_it_was(lean):
    assert lean["restored"]


def test_another_version_is_imported_as_it_is_with_the_same_result(lean):
    plain = trained("0.1")
    assert plain["loaded"] == ["mlflow", "torch._inductor.compile_fx"]
    for key in ("losses", "weights"):
        assert plain[key] == lean[key]


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.19.0", True), ("0.19.8+cu13", True), ("0.190.0", False), ("0.20.0", False),
     ("1.19", False)],
)  # fmt: skip
def test_known_are_the_versions_of_which_this_was_tried(version, known):
    assert is_known_version(version) is known
