"""Trainings on a CUDA device: every ZeRO stage and precision, resumes, and waiting for the device.

They run in processes of their own: DeepSpeed decides once whether it works on CUDA or the CPU.
"""

import itertools
from pathlib import Path
from typing import Any

import gpu_rank
import pytest
import torch
from tiny import TinyLoader, TinyTask

from sbf_dist.train.single import SingleEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EACH = [f"{s} {p}" for s, p in itertools.product(gpu_rank.STAGES, gpu_rank.PRECISIONS)]
TOLERANCES = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.03}  # relative, of a loss


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return gpu_rank.run(gpu_rank.losses, tmp_path_factory.mktemp("losses"))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return gpu_rank.run(gpu_rank.bits_after_resuming, tmp_path_factory.mktemp("resumed"))


def on_the_cpu(make: Any) -> list[float]:
    torch.manual_seed(3)
    return gpu_rank.train(SingleEngine(make(), gpu_rank.SETTINGS), TinyLoader(0, 1))


@pytest.mark.parametrize("name", EACH)
def test_a_training_on_the_gpu_has_the_losses_of_one_on_the_cpu(losses, name):
    expected = on_the_cpu(TinyTask)
    assert losses[name] == pytest.approx(expected, rel=TOLERANCES[name.split()[1]])


@pytest.mark.parametrize("precision", gpu_rank.PRECISIONS)
def test_an_sbf_student_trains_on_the_gpu_as_on_the_cpu(losses, precision):
    expected = on_the_cpu(gpu_rank.sbf_task)
    assert losses[f"SBF {precision}"] == pytest.approx(expected, rel=TOLERANCES[precision])


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("SyncBatchNorm", TinyTask),
        ("compiled", TinyTask),
        ("compiled SBF", gpu_rank.sbf_task),
    ],
)
def test_synchronised_batch_norms_and_compiled_students_change_no_loss(losses, name, make):
    assert losses[name] == pytest.approx(on_the_cpu(make), rel=TOLERANCES["fp32"])


@pytest.mark.parametrize("name", EACH)
def test_a_resumed_training_has_the_bits_of_one_that_was_not_cut(resumed, name):
    uncut, again = resumed[name]
    assert uncut.keys() == again.keys()
    for key, value in uncut.items():
        assert torch.equal(value, again[key]), key


def test_the_loop_waits_for_the_device_once_a_record(tmp_path: Path) -> None:
    waits = gpu_rank.run(gpu_rank.waits_for_the_device, tmp_path)
    assert len(waits) == 6
    for name, places in waits.items():
        # Reading the mode that warns of waiting is counted as one.
        own = [place for place in places if "torch/cuda/__init__" not in place]
        assert len(own) == 1 and "train/loop.py" in own[0], (name, places)
