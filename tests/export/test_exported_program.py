"""Students as programs of torch.export: PyTorch alone runs them."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sbf_dist.errors import UserError
from sbf_dist.export.exported_program import export_program, load_program
from sbf_dist.export.saved import Card


def test_a_program_runs_without_this_project_on_any_batch(
    student: nn.Module, card: Card, tmp_path: Path
) -> None:
    path = tmp_path / "student.pt2"
    export_program(student, path, card)
    images = torch.randn(5, 3, 16, 16)
    np.save(tmp_path / "images.npy", images.numpy())
    code = """
        import sys
        sys.modules["sbf_dist"] = None  # importing it fails
        import json, numpy, torch
        extra = {"card.json": ""}
        network = torch.export.load(sys.argv[1], extra_files=extra).module()
        print(*json.loads(extra["card.json"])["classes"], sep=",")
        images = torch.from_numpy(numpy.load(sys.argv[2]))
        numpy.save(sys.argv[2], torch.cat([network(images[:1]), network(images[1:])]).detach())
        """
    command = [sys.executable, "-c", textwrap.dedent(code), path, tmp_path / "images.npy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == ",".join(card.classes)
    found = torch.from_numpy(np.load(tmp_path / "images.npy"))
    torch.testing.assert_close(found, student(images).detach(), atol=1e-4, rtol=1e-4)
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()


def test_in_half_precision_it_takes_and_gives_halves(
    student: nn.Module, card: Card, tmp_path: Path
) -> None:
    export_program(student, tmp_path / "student.pt2", card, half=True)
    network, known = load_program(tmp_path / "student.pt2")
    assert known == card.model_dump(mode="json")
    images = torch.randn(3, 3, 16, 16)
    found = network(images.half())
    assert found.dtype == torch.float16
    wanted = student(images).detach()
    assert (found.float() - wanted).abs().max() < 0.02 * wanted.abs().max()


class BranchOnData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_network_that_cannot_be_traced_is_refused_by_name(card: Card, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'cifar_resnet8' cannot be exported by torch\.export"):
        export_program(BranchOnData(), tmp_path / "student.pt2", card)
    assert list(tmp_path.iterdir()) == []


class CountsImages(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).view(len(x), -1) * torch.arange(len(x))[:, None]


def test_a_network_that_asks_how_many_images_come_takes_any_number(
    card: Card, tmp_path: Path
) -> None:
    export_program(CountsImages(), tmp_path / "network.pt2", card)
    network, _ = load_program(tmp_path / "network.pt2")
    for batch in (1, 5):
        images = torch.randn(batch, 3, 16, 16)
        torch.testing.assert_close(network(images), CountsImages()(images))


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "student.pt2").write_bytes(b"no program")
    with pytest.raises(UserError, match=r"program .*student\.pt2 cannot be read"):
        load_program(tmp_path / "student.pt2")
