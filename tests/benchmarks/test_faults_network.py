"""The network whose steps the fault benchmark and the tests of recovery wait for."""

import importlib.util
import os
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def network(tmp_path: Path) -> torch.nn.Module:
    path = Path(__file__).parents[2] / "benchmarks" / "faults_network.py"
    spec = importlib.util.spec_from_file_location("faults_network", path)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make(10, str(tmp_path))


def test_the_number_of_passes_never_falls_for_one_who_reads_it_meanwhile(
    network: torch.nn.Module, tmp_path: Path
) -> None:
    passes = 500
    images = torch.zeros(2, 3, 8, 8)

    def work() -> None:
        for _ in range(passes):
            network(images)

    writer = threading.Thread(target=work)
    writer.start()
    diary = tmp_path / f"{os.getpid()}"
    seen = [0]
    while writer.is_alive():
        text = diary.read_text() if diary.exists() else ""
        seen.append(int(text) if text else 0)
    assert seen == sorted(seen)
    assert int(diary.read_text()) == passes
