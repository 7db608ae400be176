"""A whole run whose tracking server asks for a password, and is away at first."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mlflow_double import server
from waiting import eventually

SBF = Path(sys.executable).with_name("sbf")
NETWORK = Path(__file__).parents[3] / "benchmarks" / "faults_network.py"
RECIPE = f"""
name: tiny
data: {{source: digits, image_size: 12, labelled_per_class: 5, crop: 1.0}}
teachers:
  - name: one
    model: {NETWORK}:make
    arguments: {{diary: ., pace: pace}}
    training: {{steps: 6, batch_size: 16, log_every: 2}}
compress: {{teacher: one, macs: 0.6, sources: 2, images: 32}}
distill: {{training: {{steps: 4, batch_size: 16}}}}
"""
SECRET = "hunter-4711"
pytestmark = pytest.mark.slow


def test_a_training_begins_without_its_server_and_its_password_is_in_no_file(
    tmp_path: Path,
) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "pace").write_text("3 240")  # the rest waits until the server is there
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with server() as double:
        double.credentials = f"me:{SECRET}"
        double.stop()
        uri = double.uri.replace("http://", f"http://me:{SECRET}@")
        process = subprocess.Popen(
            [SBF, "run", "tiny.yaml", "--until", "teachers", f"tracking.uri={uri}"],
            cwd=tmp_path,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines: list[str] = []
        assert process.stdout is not None
        reading = threading.Thread(target=lambda: lines.extend(process.stdout or []))
        reading.start()
        try:
            eventually(
                lambda: (
                    any("does not answer" in line for line in lines) or process.poll() is not None
                )
            )
            double.start()
            eventually(lambda: double.history("one/loss") or process.poll() is not None)
            (tmp_path / "pace").unlink()
            assert process.wait(timeout=240) == 0, lines
        finally:
            process.kill()
            reading.join()
    assert [step for step, _ in double.history("one/loss")] == [2, 4, 6], "".join(lines)
    assert double.status("teachers") == "FINISHED"
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "tiny.yaml"]
    assert len(files) > 10
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in "".join(lines)
