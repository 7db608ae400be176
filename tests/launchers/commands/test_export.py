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


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe of a run of an earlier version, to be changed."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(BEFORE, tmp_path / "own") / "recipe.json"


def test_a_run_whose_training_needed_gpus_is_exported_without(sbf: Sbf, own: Path) -> None:
    recipe = json.loads(own.read_text())
    recipe["distill"]["training"] |= {"sync_batchnorm": True, "precision": "fp16"}
    own.write_text(json.dumps(recipe))
    code, _, err = sbf("export", "own", "--out", "exported")
    assert code == 0, err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "recipe.json is damaged: Expecting property name"),
        ("[]", "recipe.json is damaged: it holds no object"),
        ('{"name": "x"}', "recipe.json: data is missing"),
    ],
)
@pytest.mark.parametrize("command", [("export", "own", "--out", "new"), ("label", "report", "own")])
def test_a_damaged_recipe_of_a_run_is_named(
    sbf: Sbf, own: Path, command: tuple[str, ...], content: str, message: str
) -> None:
    own.write_text(content)
    code, out, err = sbf(*command)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
