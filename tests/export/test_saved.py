import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from students import half_of_every_block, randomise
from torch import nn

from sbf_dist import models
from sbf_dist.compression.convert import convert
from sbf_dist.compression.one_shot import compress
from sbf_dist.compression.plan import Plan
from sbf_dist.errors import UserError
from sbf_dist.export.onnx import export_onnx, verify_onnx
from sbf_dist.export.optimize import optimize
from sbf_dist.export.saved import (
    CARD,
    ONNX,
    PLAN,
    WEIGHTS,
    Card,
    load_card,
    load_student,
    save,
    save_student,
)


@pytest.fixture
def saved(student: nn.Module, plan: Plan, card: Card, tmp_path: Path) -> Path:
    folder = tmp_path / "student"
    save_student(folder, student, plan, card)
    return folder


def test_loaded_student_is_bit_for_bit_the_saved_one(saved: Path, student: nn.Module) -> None:
    loaded = load_student(saved)
    images = torch.randn(8, 3, 16, 16)
    assert not loaded.training
    assert torch.equal(loaded(images), student(images))


def test_folder_holds_three_files_and_nothing_is_left_beside_it(saved: Path) -> None:
    assert {entry.name for entry in saved.iterdir()} == {WEIGHTS, PLAN, CARD}
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


def test_card_comes_back(saved: Path, card: Card) -> None:
    assert load_card(saved).model_copy(update={"weights_digest": None}) == card


def test_student_in_channels_last_is_saved(
    student: nn.Module, plan: Plan, card: Card, tmp_path: Path
) -> None:
    student = student.to(memory_format=torch.channels_last)
    save_student(tmp_path / "student", student, plan, card)
    loaded = load_student(tmp_path / "student").state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in student.state_dict().items())


def test_older_student_is_replaced_with_its_onnx_file(
    saved: Path, student: nn.Module, plan: Plan, card: Card
) -> None:
    (saved / ONNX).write_bytes(b"of the older student")
    with torch.no_grad():
        student.head.bias += 1
    save_student(saved, student, plan, card)
    assert torch.equal(load_student(saved).head.bias, student.head.bias)
    assert not (saved / ONNX).exists()


def test_folder_with_other_things_is_not_overwritten(
    saved: Path, student: nn.Module, plan: Plan, card: Card
) -> None:
    (saved / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        save_student(saved, student, plan, card)
    assert (saved / "thesis.tex").exists()


@pytest.mark.parametrize("target", ["student", "not there yet"])
def test_what_a_link_leads_to_is_replaced_and_the_link_stays(
    saved: Path, student: nn.Module, plan: Plan, card: Card, target: str
) -> None:
    link = saved.with_name("latest")
    link.symlink_to(target)
    with torch.no_grad():
        student.head.bias += 1
    save_student(link, student, plan, card)
    assert link.is_symlink() and link.resolve().name == target
    assert torch.equal(load_student(link).head.bias, student.head.bias)
    assert {entry.name for entry in saved.parent.iterdir()} == {"student", "latest", target}


def test_the_current_folder_is_filled_and_stays_the_current_one(
    student: nn.Module, plan: Plan, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    monkeypatch.chdir(folder)
    before = Path().stat().st_ino
    for _ in range(2):
        with torch.no_grad():
            student.head.bias += 1
        save_student(Path(), student, plan, card)
        assert torch.equal(load_student(".").head.bias, student.head.bias)
        Path(ONNX).write_bytes(b"of the older student")
    assert folder.stat().st_ino == before == Path().stat().st_ino
    assert {entry.name for entry in folder.iterdir()} == {WEIGHTS, PLAN, CARD, ONNX}
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def change_a_source(path: Path) -> None:
    content = json.loads(path.read_text())
    content["layers"]["stages.0.0.conv1"]["sources"][0][0] = 2
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", [WEIGHTS, PLAN, CARD])
@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_missing_or_cut_file_is_refused_by_name(
    saved: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(saved / name)
    with pytest.raises(UserError, match=name):
        load_student(saved)


@pytest.mark.parametrize(("name", "damage"), [(WEIGHTS, flip_a_bit), (PLAN, change_a_source)])
def test_file_that_differs_from_what_was_saved_is_refused_by_name(
    saved: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(saved / name)
    with pytest.raises(UserError, match=name):
        load_student(saved)


def test_missing_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a saved student"):
        load_student(tmp_path / "nothing")


def test_network_that_the_plan_does_not_make_is_not_saved(
    plan: Plan, card: Card, tmp_path: Path
) -> None:
    dense = randomise(models.build(plan.model, 10))
    with pytest.raises(ValueError, match="in the plan"):
        save_student(tmp_path / "student", dense, plan, card)
    assert list(tmp_path.iterdir()) == []


def test_card_of_another_plan_is_not_saved(student: nn.Module, card: Card, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another plan"):
        save_student(tmp_path / "student", student, half_of_every_block(2), card)


def test_card_must_name_every_class(plan: Plan) -> None:
    with pytest.raises(UserError, match="3 class names for a plan of 10 classes"):
        Card.of(plan, classes=["a", "b", "c"], mean=[0.5] * 3, std=[0.2] * 3)


class Counting(nn.Module):
    """Keeps something that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1)
        )
        self.seen: object = {"images": 0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).flatten(1)

    def get_extra_state(self) -> object:
        return self.seen

    def set_extra_state(self, state: object) -> None:
        self.seen = state


def test_extra_state_that_is_no_tensor_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Counting().eval()
    network.seen = {"images": 7, "names": ["a"]}
    student, _ = compress(network, torch.randn(32, 3, 9, 9), macs=0.7)
    save(student, tmp_path / "student")
    loaded = load_student(tmp_path / "student", build=Counting)
    assert loaded.seen == {"images": 7, "names": ["a"]}
    images = torch.randn(2, 3, 9, 9)
    assert torch.equal(loaded(images), student(images))


def test_extra_state_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    student, _ = compress(Counting().eval(), torch.randn(32, 3, 9, 9), macs=0.7)
    student.seen = object()
    with pytest.raises(UserError, match="extra state _extra_state is a object"):
        save(student, tmp_path / "student")
    assert list(tmp_path.iterdir()) == []


def test_fidelity_stands_on_the_card(tmp_path: Path) -> None:
    student, plan = compress(Counting().eval(), torch.randn(64, 3, 9, 9), macs=0.7)
    save(student, tmp_path / "student", fidelity=plan.fidelity)
    assert plan.fidelity is not None
    assert load_card(tmp_path / "student").fidelity == plan.fidelity


class Quiet(nn.Module):
    """Its train() returns nothing, as that of many backbones of detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.norm(self.conv1(x)).relu()).mean((2, 3))

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_a_network_whose_train_returns_nothing_is_loaded_optimized_and_exported(
    tmp_path: Path,
) -> None:
    plan = half_of_every_block(sources=1)
    layers = {"conv1": plan.layers["conv"], "conv2": plan.layers["stages.0.0.conv2"]}
    plan = plan.model_copy(update={"model": "mine:Quiet", "classes": 16, "layers": layers})
    student = randomise(convert(Quiet(), plan))
    student.train()
    save(student, tmp_path / "student")
    loaded = load_student(tmp_path / "student", build=Quiet)
    assert not loaded.training and not loaded.norm.training
    images = torch.randn(4, 3, 16, 16)
    student.eval()
    assert torch.equal(loaded(images), student(images))
    torch.testing.assert_close(optimize(student)(images), student(images), rtol=1e-4, atol=1e-4)
    export_onnx(student, tmp_path / "student.onnx")
    assert verify_onnx(tmp_path / "student.onnx", student, images) < 1e-4


class Positioned(nn.Module):
    """Registers a buffer when it first sees an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.conv1(x).relu()).relu()
        if not hasattr(self, "places"):
            self.register_buffer("places", torch.linspace(0, 1, x.shape[-1]))
        return self.conv3(x + self.places.mean())


def test_buffers_that_come_with_the_first_image_are_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Positioned(), torch.randn(8, 3, 12, 12)
    student, _ = compress(model, images, macs=0.9)
    student.places.fill_(0.3)
    save(student, tmp_path / "student")
    loaded = load_student(tmp_path / "student", build=Positioned)
    assert torch.equal(loaded(images), student(images))
    save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / PLAN).read_bytes() == (tmp_path / "student" / PLAN).read_bytes()


def test_weights_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, _ = compress(Positioned(), torch.randn(8, 3, 12, 12), macs=0.9)
    save(student, tmp_path / "student")

    class Without(Positioned):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv3(self.conv2(self.conv1(x)))

    with pytest.raises(UserError, match=r"does not fit plan\.json: .*places"):
        load_student(tmp_path / "student", build=Without)
