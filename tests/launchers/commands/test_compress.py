"""`sbf compress`: what it writes and says, and what it refuses."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from launchers import cli
from pipelines.sources import digits
from sbf_dist import models
from sbf_dist.compression.cost import count
from sbf_dist.compression.plan import Plan
from sbf_dist.errors import UserError
from sbf_dist.export.saved import load_card, load_student
from sbf_dist.export.sbf_student import Student
from sbf_dist.weights import save_weights

SIZE = 16
SMALL = [f"data.image_size={SIZE}", "compress.images=48", "compress.sources=2", "data.crop=1.0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as files, and a network with random weights."""
    root = tmp_path_factory.mktemp("compress")
    digits.write(root / "digits")
    torch.manual_seed(0)
    save_weights(models.build("cifar_resnet8_w4", 10), root / "resnet8.safetensors")
    return root


def arguments(folder: Path, **changes: str) -> list[str]:
    options = {
        "model": "cifar_resnet8_w4",
        "weights": str(folder / "resnet8.safetensors"),
        "data": str(folder / "digits"),
        "budget": "macs=0.6",
        "out": str(folder / "student"),
    } | changes
    return ["compress", *(part for key, value in options.items() for part in (f"--{key}", value))]


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    """What the command says when all is well."""
    result = CliRunner().invoke(cli.app, [*arguments(folder), *SMALL], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_student_is_within_the_budget_and_is_what_is_exported(
    output: str, folder: Path
) -> None:
    student = load_student(folder / "student")
    plan = Plan.load(folder / "student" / "plan.json")
    dense = count(models.build("cifar_resnet8_w4", 10), (3, SIZE, SIZE)).macs
    assert count(student, (3, SIZE, SIZE)).macs == plan.macs_after <= 0.6 * dense
    images = torch.randint(0, 256, (4, SIZE, SIZE, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(load_card(folder / "student").__dict__[k]) for k in ("mean", "std"))
    logits = student(((images / 255 - mean) / std).permute(0, 3, 1, 2))
    portable = Student(str(folder / "student" / "student.onnx")).predict(images.numpy())[
        "probabilities"
    ]
    torch.testing.assert_close(
        torch.from_numpy(portable), logits.softmax(1).detach(), atol=1e-4, rtol=1e-3
    )


def test_accuracy_before_and_after_is_reported_and_stands_on_the_card(
    output: str, folder: Path
) -> None:
    rows = [line for line in output.splitlines() if line.startswith(("dense ", "SBF, no training"))]
    assert len(rows) == 2
    top1 = load_card(folder / "student").top1
    assert top1 is not None
    assert f"{100 * top1:.1f}" in rows[1]


def test_agreement_with_the_dense_network_is_reported_and_stands_on_the_card(
    output: str, folder: Path
) -> None:
    (row,) = [line for line in output.splitlines() if "SBF, no training" in line]
    fidelity = load_card(folder / "student").fidelity
    assert fidelity is not None
    assert fidelity.images > 8, "of the validation part"
    cells = row.split()
    assert f"{100 * fidelity.agreement:.1f}" in cells
    assert f"{fidelity.kl:.3f}" in cells


def test_a_network_of_other_outputs_is_compressed_without_an_accuracy(
    output: str, folder: Path
) -> None:
    torch.manual_seed(0)
    save_weights(models.build("cifar_resnet8_w4", 7), folder / "seven.safetensors")
    words = arguments(folder, weights=str(folder / "seven.safetensors"), out=str(folder / "seven"))
    result = CliRunner().invoke(cli.app, [*words, "--classes", "7", *SMALL], catch_exceptions=False)
    assert "the network has 7 outputs, the images have 10 classes" in result.output
    assert load_card(folder / "seven").classes == [str(i) for i in range(7)]
    assert load_card(folder / "seven").top1 is None
    assert load_card(folder / "seven").fidelity is not None, "which needs no labels"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "mac=0.5"}, "budget 'mac=0.5' must look like macs=0.5"),
        ({"budget": "macs"}, "budget 'macs' must look like macs=0.5"),
        ({"budget": "macs=1.5"}, "compress.macs = 1.5 must be"),
        ({"model": "cifar_resnet9"}, "depth must be 6n"),
        ({"weights": "/nowhere.safetensors"}, "weights /nowhere.safetensors do not exist"),
        ({"data": "/nowhere"}, "data /nowhere: is not a folder"),
        ({"model": "cifar_resnet14_w4"}, "lack stages"),
    ],
)
def test_a_mistake_is_reported_in_one_line_and_nothing_is_written(
    folder: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    out = tmp_path / "student"
    words = [*arguments(folder, **({"out": str(out)} | changes)), *SMALL]
    result = CliRunner().invoke(cli.app, words)
    assert isinstance(result.exception, UserError), result.output
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not out.exists()


def test_images_without_labels_serve_as_well(output: str, folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for picture in sorted((folder / "digits" / "val" / "3").iterdir())[:40]:
        (plain / picture.name).symlink_to(picture)
    words = arguments(folder, data=str(plain), out=str(tmp_path / "student"))
    refused = CliRunner().invoke(cli.app, [*words, *SMALL])
    assert "how many classes it has is not known" in str(refused.exception)
    assert "--classes" in str(refused.exception)
    result = CliRunner().invoke(
        cli.app, [*words, "--classes", "10", *SMALL], catch_exceptions=False
    )
    assert "accuracy not measured: the images have no labels" in result.output
    assert "agreement and KL not measured" not in result.output
    assert load_card(tmp_path / "student").top1 is None


@pytest.mark.parametrize(
    ("number", "budget", "why"),
    [
        (12, "macs=1.0", "the student is the dense network, nothing was changed"),
        (5, "macs=0.6", "no image could be held out of the calibration"),
    ],
)
def test_why_the_student_was_not_compared_is_said(
    folder: Path, tmp_path: Path, number: int, budget: str, why: str
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for picture in sorted((folder / "digits" / "val" / "3").iterdir())[:number]:
        (plain / picture.name).symlink_to(picture)
    words = arguments(folder, data=str(plain), out=str(tmp_path / "student"), budget=budget)
    result = CliRunner().invoke(
        cli.app, [*words, "--classes", "10", *SMALL], catch_exceptions=False
    )
    assert f"agreement and KL not measured: {why}" in result.output
    assert ("not judged: none of 5 calibration images" in result.output) == (number == 5)


OWN = """
import torch
from torch import nn

class Two(nn.Module):
    \"\"\"A map and its mean.\"\"\"

    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 16, 3, padding=1),
            nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
        )

    def forward(self, x):
        x = self.body(x)
        return {"map": x, "mean": x.mean((2, 3))}

class Headed(Two):
    \"\"\"Logits beside features.\"\"\"

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.body(x)
        return self.fc(x.mean((2, 3))), x

class Maps(Two):
    \"\"\"A map of classes.\"\"\"

    def forward(self, x):
        return self.body(x)
"""


def test_a_network_of_ones_own_is_named_by_its_file_and_needs_no_classes(
    output: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "two.py").write_text(OWN)
    torch.manual_seed(0)
    model = models.build("nets/two.py:Two", None, {"width": 12})
    save_weights(model, tmp_path / "two.safetensors")
    words = arguments(folder, model="nets/two.py:Two", weights="two.safetensors", out="student")
    settings = ["arguments.width=12", "compress.outputs=[map]", "compress.divergence=error"]
    result = CliRunner().invoke(cli.app, [*words, *SMALL, *settings], catch_exceptions=False)
    assert "error" in result.output
    assert "of the outputs' variance" in " ".join(result.output.split())
    assert "accuracy not measured: the network is not a classifier" in result.output
    card = load_card(Path("student"))
    assert (card.model, card.arguments, card.classes) == ("nets/two.py:Two", {"width": 12}, [])
    student = load_student("student", build="nets/two.py:Two")
    assert set(student(torch.zeros(1, 3, 20, 20))) == {"map", "mean"}
    with pytest.raises(ValueError, match="is not a classifier: it gives map, mean"):
        Student("student/student.onnx")


def compress_own(folder: Path, place: Path, network: str, *settings: str) -> Plan:
    """Compress a network of OWN on images of classes, in the folder `place`."""
    (place / "own.py").write_text(OWN)
    torch.manual_seed(0)
    save_weights(models.build(f"own.py:{network}", None, {}), place / "own.safetensors")
    words = arguments(folder, model=f"own.py:{network}", weights="own.safetensors", out="student")
    result = CliRunner().invoke(cli.app, [*words, *SMALL, *settings], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return Plan.load(Path("student/plan.json"))


@pytest.mark.parametrize("settings", [(), ("compress.outputs=[0]",)])
def test_logits_among_other_outputs_are_compared_on_the_validation_part(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = compress_own(folder, tmp_path, "Headed", *settings)
    fidelity = load_card(Path("student")).fidelity
    assert fidelity is not None and plan.fidelity is not None
    assert fidelity.images > plan.fidelity.images
    assert fidelity.agreement is not None and 0 < fidelity.agreement <= 1
    assert (fidelity.error is None) == bool(settings), "of the features, unless they do not count"


def test_maps_of_classes_agree_at_a_share_of_their_positions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = compress_own(folder, tmp_path, "Maps", "compress.divergence=kl")
    fidelity = load_card(Path("student")).fidelity
    assert fidelity is not None and plan.fidelity is not None
    assert fidelity.agreement is not None and 0 < fidelity.agreement <= 1
    assert fidelity.kl is not None and plan.fidelity.kl is not None
    assert fidelity.kl < 10 * plan.fidelity.kl, "a mean over positions, as the plan's"


def test_rounds_are_refused_where_nothing_is_trained_between_them(
    folder: Path, tmp_path: Path
) -> None:
    words = [*arguments(folder, out=str(tmp_path / "student")), *SMALL, "compress.rounds=3"]
    result = CliRunner().invoke(cli.app, words)
    assert "compress: rounds = 3 must be 1 here" in str(result.exception)


def test_a_folder_with_other_things_in_it_is_refused_before_the_work(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").touch()
    result = CliRunner().invoke(cli.app, [*arguments(folder, out=str(tmp_path)), *SMALL])
    assert "holds 'thesis.tex', which is not part of a student" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
