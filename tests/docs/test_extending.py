import re
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

import sbf_dist
from sbf_dist import models
from sbf_dist.recipe import validate

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"(?m)(?:^(?: {4}.*)?\n)+", PAGE)]


def block_with(text: str) -> str:
    return next(block.strip() + "\n" for block in BLOCKS if text in block)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "mine.py").write_text(block_with("def small"))
    return tmp_path


def test_the_network_of_the_page_is_built_and_loaded_by_its_name(folder):
    dense = models.build("nets/mine.py:small", 4).eval()
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    name = models.Architecture.of("nets/mine.py:small", 4)
    student, plan = sbf_dist.compress(dense, images, macs=0.7, name=name)
    assert plan.macs_after <= 0.7 * plan.macs_before
    sbf_dist.save(student, folder / "student")
    loaded = sbf_dist.load(folder / "student", build="nets/mine.py:small")
    assert torch.equal(loaded(images), student(images))


def test_the_recipe_of_the_page_is_valid():
    recipe = validate(yaml.safe_load(block_with("name: mine\ndata:")), [], "mine.yaml")
    assert [teacher.model for teacher in recipe.teachers] == ["nets/mine.py:small", "cifar_resnet8"]
