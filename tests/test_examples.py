"""The examples as a reader runs them: programs of their own, with small settings."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import models

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
ROUNDING = 0.01  # of millions of multiply-adds
ROW = r"^{name} +(\d+\.\d) +(\d+\.\d\d) +(\d+\.\d\d\d)$"


def run(folder: Path, *command: str) -> str:
    """What a program prints; nothing is said on standard error."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def row(printed: str, name: str) -> tuple[float, float, float]:
    """Top-1 in percent, millions of multiply-adds and milliseconds of a network."""
    found = re.search(ROW.format(name=name), printed, re.MULTILINE)
    assert found, printed
    top1, macs, ms = map(float, found.groups())
    assert 0 <= top1 <= 100
    assert ms > 0
    return top1, macs, ms


def test_a_layer_in_ones_own_network_learns_at_fewer_multiply_adds(tmp_path):
    printed = run(tmp_path, str(EXAMPLES / "sbf_layer.py"), "--steps", "40")
    dense, sbf = row(printed, "dense"), row(printed, "SBF")
    assert sbf[0] > 30  # a guess has 10
    assert sbf[1] < 0.6 * dense[1]


def test_a_plain_loop_distils(tmp_path):
    given = ["--steps", "12", "--model", "cifar_resnet8_w8", "--macs", "0.6"]
    printed = run(tmp_path, str(EXAMPLES / "distill.py"), *given)
    row(printed, "compressed")
    dense, distilled = row(printed, "dense teacher"), row(printed, "… and distilled")
    assert distilled[1] <= 0.6 * dense[1] + ROUNDING


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(24):
        path = folder / "bc"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((40, 40), 10 * number + 10).convert("RGB").save(path)
    return folder


SMALL = ["--model", "shufflenet_v2_x0_5", "--macs", "0.95", "--calibration", "32"]
SMALL += ["--keep", "stage[34].*", "conv5.*"]


def test_a_network_of_torchvision_is_compressed_from_a_folder_and_a_file(tmp_path, photos):
    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save(models.shufflenet_v2_x0_5(num_classes=2).state_dict(), weights)
    given = ["--images", str(photos), "--weights", str(weights), "--size", "32", "--out", "student"]
    printed = run(tmp_path, str(EXAMPLES / "compress_torchvision.py"), *SMALL, *given)
    dense, compressed = row(printed, "dense"), row(printed, "compressed")
    assert compressed[1] <= 0.95 * dense[1] + ROUNDING
    assert "RANDOM" not in printed
    assert (tmp_path / "student" / "weights.safetensors").exists()


def test_without_a_way_to_published_weights_it_says_that_it_begins_with_random_ones(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("compress_torchvision")
    images, labels, classes = example.load_images(None, 32, 100)
    network = example.load_network("shufflenet_v2_x0_5", None, len(classes))
    said = r"^published weights cannot be fetched \(.+\): starting from RANDOM"
    assert re.search(said, capsys.readouterr().out, re.MULTILINE)
    example.train(network, images, labels, steps=2)
    assert 0 <= example.accuracy(network.eval(), images, labels) <= 1


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    """As plain Python: it has no magics, and so needs no Jupyter. Parameters as papermill's."""
    cells = json.loads((EXAMPLES / "walkthrough.ipynb").read_text())["cells"]
    program = []
    for cell in cells:
        if cell["cell_type"] == "code":
            program.append("".join(cell["source"]))
            if "parameters" in cell["metadata"].get("tags", []):
                program.append("STEPS, MACS, OUT = 8, 0.6, 'there'")
    (tmp_path / "notebook.py").write_text("\n".join(program))
    printed = run(tmp_path, "notebook.py")
    assert row(printed, "compressed, distilled")[1] <= 0.6 * row(printed, "dense")[1] + ROUNDING
    assert (tmp_path / "there" / "student.onnx").exists()


def test_the_notebook_has_its_pictures_and_is_small():
    path = EXAMPLES / "walkthrough.ipynb"
    text = path.read_text()
    assert text.count('"image/png"') >= 4
    assert '"output_type": "error"' not in text
    assert path.stat().st_size < 400_000
