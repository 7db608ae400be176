"""Networks of the user's own code, by name: of a file or of a module."""

import json
import sys
from pathlib import Path

import pytest
import torch
from small_networks import Small, pictures, small

import sbf_dist
from sbf_dist import models, user_code
from sbf_dist.errors import UserError
from sbf_dist.models import Architecture

CODE = """
from dataclasses import dataclass
from torch import nn
import beside

@dataclass
class Options:
    width: int = 8

class Net(nn.Sequential):
    def __init__(self, width=8, num_classes=5, channels=3):
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, num_classes),
        )

def fixed():
    return Net(beside.WIDTH, 3)

def number():
    return 3

def fails():
    raise RuntimeError("no\\ndata")

not_callable = 7
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the user's code, in which they work."""
    folder = tmp_path / "work" / "nets"
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text(CODE)
    (folder / "beside.py").write_text("WIDTH = 12\n")
    (folder / "__init__.py").touch()
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    for name in list(sys.modules):
        if name.partition(".")[0] in ("nets", "beside") or name.startswith("sbf_dist_user_"):
            del sys.modules[name]


def test_a_function_of_a_file_builds_a_network(nets):
    model = models.build("nets/mine.py:Net", 7, {"width": 4})
    assert model[-1].out_features == 7
    assert model[0].out_channels == 4
    assert models.build("nets/mine.py:Net", 7, {"num_classes": 2})[-1].out_features == 2
    assert models.build("nets/mine.py:Net", None)[-1].out_features == 5
    assert models.build(f"{nets}/mine.py:fixed", 7)[0].out_channels == 12
    assert type(model) is type(models.build("nets/mine.py:Net", 3)), "the file is read once"
    assert str(nets) not in sys.path


def test_a_function_of_a_module_builds_a_network(nets):
    assert models.build("small_networks:Small", 7, {"width": 4}).stem.out_channels == 4
    (nets / "beside_module.py").write_text("from torch import nn\nmake = nn.Identity\n")
    assert isinstance(models.build("nets.beside_module:make", None), torch.nn.Identity)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nets/other.py:Net", {}, "'nets/other.py:Net': there is no file nets/other.py"),
        ("nets/mine.py:Nett", {}, "it has no function 'Nett'; did you mean 'Net'?"),
        ("nets/mine.py:not_callable", {}, "it has no function 'not_callable'"),
        ("nets/mine.py:Net", {"depth": 3}, "cannot be built with the arguments {'depth': 3"),
        ("nets/mine.py:number", {}, "returns a int: it must be a module"),
        ("nets/mine.py:fails", {}, "fails: RuntimeError: no data"),
        ("no_such_package.nets:Net", {}, "there is no module 'no_such_package'"),
        ("small_networks:Smal", {}, "it has no function 'Smal'; did you mean 'Small'?"),
        ("timm:test_resnet", {"depth": 3}, "cannot be built with {'depth': 3}"),
        ("timm:test_resnet", {"pretrained": True}, "pretrained is not an argument here"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "weights is not an argument here"),
        ("cifar_resnet8", {"width": 3}, "'cifar_resnet8' takes no arguments, not width"),
    ],
)
def test_what_cannot_be_built_is_told_in_one_line(nets, name, arguments, message):
    with pytest.raises(UserError) as told:
        models.build(name, 5, arguments)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_a_file_that_fails_is_told_in_one_line_and_tried_again(nets):
    (nets / "broken.py").write_text("1 / 0\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"nets/broken.py fails: ZeroDivisionError"):
            models.build("nets/broken.py:Net", 5)


def test_networks_of_libraries_need_a_number_of_classes():
    with pytest.raises(UserError, match=r"'timm:test_resnet': how many classes .* \(--classes\)"):
        models.build("timm:test_resnet", None)
    assert models.build("timm:test_resnet", None, {"num_classes": 3}).fc.out_features == 3


def test_an_architecture_keeps_all_arguments(nets):
    made = Architecture.of("nets/mine.py:Net", 7, {"width": 4})
    assert made.arguments == {"width": 4, "num_classes": 7}
    assert Architecture.of("nets/mine.py:fixed", 7).arguments == {}
    assert Architecture.of("timm:test_resnet", 7).arguments == {}
    assert made.build()[-1].out_features == 7


def test_arguments_are_kept_and_used_again_where_the_user_names_the_code(nets, tmp_path):
    made = Architecture.of("nets/mine.py:Net", 7, {"width": 8})
    torch.manual_seed(0)
    model = made.build().eval()
    images = pictures(16)
    student, plan = sbf_dist.compress(model, images, macs=0.6, name=made)
    assert (plan.model, plan.classes) == ("nets/mine.py:Net", 7)
    assert plan.arguments == {"width": 8, "num_classes": 7}
    sbf_dist.save(student, tmp_path / "student")
    card = json.loads((tmp_path / "student" / "card.json").read_text())
    assert card["arguments"] == {"width": 8, "num_classes": 7}
    for build in ("nets/mine.py:Net", f"{nets}/mine.py:Net", type(model)):
        loaded = sbf_dist.load(tmp_path / "student", build=build)
        assert torch.equal(loaded(images), student(images))
    with pytest.raises(UserError, match=r"build does not take the arguments .*'width': 8"):
        sbf_dist.load(tmp_path / "student", build=lambda width: model)


def test_loading_runs_no_code_that_the_folder_names(nets, tmp_path):
    trap = nets / "trap.py"
    trap.write_text(
        "import pathlib\npathlib.Path('sprung').touch()\nfrom small_networks import Small\n"
    )
    student, plan = sbf_dist.compress(small(), pictures(16), macs=0.6, name="nets/trap.py:Small")
    assert plan.model == "nets/trap.py:Small"
    sbf_dist.save(student, tmp_path / "student")
    with pytest.raises(UserError, match=r"what a folder names is not run") as told:
        sbf_dist.load(tmp_path / "student")
    assert "build='nets/trap.py:Small'" in str(told.value)
    assert not Path("sprung").exists()
    sbf_dist.load(tmp_path / "student", build=Small)
    assert not Path("sprung").exists()
    sbf_dist.load(tmp_path / "student", build="nets/trap.py:Small")
    assert Path("sprung").exists(), "the trap works"


def test_arguments_of_none_survive_the_plan(tmp_path):
    made = Architecture("small_networks:Small", 5, {"norm": None, "sizes": [1, None]})
    _, plan = sbf_dist.compress(small(), pictures(16), macs=0.6, name=made)
    plan.save(tmp_path / "plan.json")
    read = sbf_dist.Plan.load(tmp_path / "plan.json")
    assert read.arguments == made.arguments
    assert read.digest() == plan.digest()


def test_the_files_of_a_network_are_its_own_and_those_of_its_folder_that_it_imports(nets):
    (nets / "beside.py").write_text("import torch, parts.blocks as blocks\nWIDTH = 12\n")
    (nets / "unused.py").touch()
    (nets / "parts").mkdir()  # a package without __init__.py
    (nets / "parts" / "blocks.py").write_text("from . import norms, missing\nfrom beside import *")
    (nets / "parts" / "norms.py").write_text("from .. import unused = no Python")
    files = user_code.source_files("nets/mine.py:Net")
    assert files == {
        name: Path("nets", name)
        for name in ("mine.py", "beside.py", "parts/blocks.py", "parts/norms.py")
    }
    assert user_code.source_files(f"{nets}/mine.py:Net").keys() == files.keys()


def test_the_files_of_a_module_are_those_of_its_package_too(nets):
    (nets / "parts.py").write_text("def block(): from . import beside")
    (nets / "mine.py").write_text("from nets.parts import block\nimport other, sbf_dist.ops\n")
    Path("other.py").touch()
    Path("sbf_dist.py").touch()
    files = user_code.source_files("nets.mine:Net")
    assert set(files) == {
        "nets/__init__.py",
        "nets/mine.py",
        "nets/parts.py",
        "nets/beside.py",
        "other.py",
    }
    assert set(user_code.source_files("timm.models.resnet:ResNet")) >= {
        "timm/__init__.py",
        "timm/models/resnet.py",
    }
    with pytest.raises(UserError, match="there is no module 'no_such_package'"):
        user_code.source_files("no_such_package.nets:Net")
