"""`sbf export`: every form of a student, with its table and its model card."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from huggingface_hub import ModelCard

from launchers import exporting
from launchers.export_forms import Written
from sbf_dist.export.saved import load_student
from sbf_dist.tracking import model as mlflow_model

BEFORE = Path(__file__).parents[1] / "before" / "run"
Sbf = Callable[..., tuple[int, str, str]]
FILES = {
    "onnx": "student.onnx",
    "torch-export": "student.pt2",
    "safetensors": "weights.safetensors",
    "mlflow": "MLmodel",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, with one of an earlier version."""
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(BEFORE, runs / "before")
    return runs


@pytest.fixture
def export(sbf: Sbf, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict]]:
    monkeypatch.chdir(folder)

    def run(form: str, precision: str) -> list[dict]:
        words = ("--format", form, "--precision", precision, "--out", form, "--json")
        code, out, err = sbf("export", "before", *words)
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.mark.parametrize(
    ("form", "precision"),
    [("onnx", "int8"), ("torch-export", "fp16"), ("safetensors", "fp16"), ("mlflow", "fp32")],
)
def test_a_student_is_written_judged_and_described(
    export: Callable[..., list[dict]], folder: Path, form: str, precision: str
) -> None:
    rows = export(form, precision)
    assert [row["precision"] for row in rows] == list(dict.fromkeys(["fp32", precision]))
    assert (folder / form / FILES[form]).is_file()
    recorded = json.loads((BEFORE / "stages" / "evaluate.json").read_text())["rows"]
    top1 = next(row["top1"] for row in recorded if row["network"] == "sbf-distilled")
    assert rows[0]["divergence"] < 1e-6
    assert rows[0]["top1"] == pytest.approx(top1, abs=0.003), "its crop is that of the recipe"
    assert rows[-1]["divergence"] < 0.01
    if precision == "fp16":
        assert rows[1]["megabytes"] < rows[0]["megabytes"]
    text = (folder / form / "README.md").read_text()
    assert ModelCard(text).data.model_name is None or "digits" in text
    assert "1247 unlabelled" in text
    if form == "safetensors":
        assert load_student(folder / form).training is False
    if form == "mlflow":
        picture = next((folder / "data" / "digits").rglob("*.jpg")).read_bytes()
        (answer,) = mlflow_model.answers(folder / form, [picture])
        assert sum(answer) == pytest.approx(1)
    if form == "onnx":
        onnxruntime.InferenceSession(folder / form / FILES[form])


def test_a_file_that_disagrees_with_pytorch_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sbf: Sbf
) -> None:
    def wrong(student: object, precision: str, place: Path, display: object) -> Written:
        path = place / "student.onnx"
        path.write_bytes(b"x")
        return Written(path, lambda images: [np.zeros((len(images), 10), np.float32)], None)

    monkeypatch.chdir(folder)
    monkeypatch.setitem(exporting.FORMS, "onnx", wrong)
    with pytest.raises(RuntimeError, match=r"student\.onnx differs from the student by"):
        sbf("export", "before/student", "--out", "wrong")
    assert not Path("wrong").exists()
    assert not list(Path().glob(".wrong*"))


def test_a_student_without_a_run_is_compared_on_noise(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sbf: Sbf
) -> None:
    monkeypatch.chdir(folder)
    shutil.copytree(BEFORE / "student", "alone")
    code, out, err = sbf("export", "alone", "--format", "safetensors", "--out", "again")
    assert code == 0, err
    assert "no images given (--data): compared on random noise" in out
    assert "Training images and labels: not known." in Path("again/README.md").read_text()
