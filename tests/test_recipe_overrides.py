"""Recipes that are changed on the command line."""

from pathlib import Path

import pytest
from minimal_recipe import MINIMAL, refusal

from sbf_dist import recipe


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(MINIMAL)
    return tmp_path / "tiny.yaml"


def test_overrides_change_what_they_name_in_the_order_given(path):
    loaded = recipe.load(
        path,
        [
            "compress.macs=0.4",
            "compress.macs=0.3",
            "teachers.1.name=three",
            "data.augmentation={flip: false, rotate: 10}",
            "distill.training.optimizer.lr=1e-3",
            "data.mean=[0, 0.5, 1]",
            "tracking.uri=null",
            "seed=5",
        ],
    )
    assert loaded.compress.macs == 0.3
    assert loaded.teachers[1].name == "three"
    assert loaded.data.augmentation.rotate == 10
    assert not loaded.data.augmentation.flip
    assert loaded.distill.training.optimizer.lr == 1e-3
    assert loaded.data.mean == (0, 0.5, 1)
    assert (loaded.tracking.uri, loaded.seed) == (None, 5)


def test_an_override_may_hold_equals_signs(path):
    loaded = recipe.load(path, ["tracking.experiment=a=b"])
    assert loaded.tracking.experiment == "a=b"


def test_an_override_changes_one_place_where_the_recipe_repeats_itself(tmp_path):
    path = tmp_path / "anchors.yaml"
    path.write_text(
        MINIMAL.replace("training: {steps: 100}", "training: &t {steps: 100, optimizer: {lr: 1}}")
        .replace("weights: two.safetensors", "training: *t")
        .replace("distill: {training: {steps: 50}}", "distill: {training: {<<: *t, steps: 50}}")
    )
    loaded = recipe.load(path, ["teachers.0.training.steps=9", "distill.training.optimizer.lr=0.5"])
    assert [teacher.training.steps for teacher in loaded.teachers] == [9, 100]
    assert [teacher.training.optimizer.lr for teacher in loaded.teachers] == [1, 1]
    assert loaded.distill.training.optimizer.lr == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "override 'steps' must look like distill.training.steps=100"),
        ("=3", "override '=3' must look like"),
        ("compress.macs=[0.5", "'[0.5' is not a YAML value"),
        ("teachers.2.name=x", "teachers has the entries 0 to 1"),
        ("teachers.-1.name=x", "teachers has the entries 0 to 1"),
        ("teachers.one.name=x", "teachers has the entries 0 to 1"),
        ("teachers.2={}", "teachers has the entries 0 to 1"),
        ("name.first=x", "override 'name.first=x': name has no keys"),
        ("name.first.second=x", "name has no keys"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(path, override, message):
    assert message in refusal(path, override)


def test_an_override_inside_of_what_is_not_set_is_refused(path):
    refused = refusal(path, "baselines=null", "baselines.optimizer.lr=1")
    assert refused == (
        "override 'baselines.optimizer.lr=1': baselines is not set; set the whole section"
    )


def test_an_override_into_an_empty_list_is_refused(path):
    assert "teachers has no entries" in refusal(path, "teachers=[]", "teachers.0.name=x")


def test_a_range_of_workers_leaves_those_that_divide_the_batches(path):
    loaded = recipe.load(path, ["workers.count=[2, 8]"])
    assert (loaded.workers.least, loaded.workers.most) == (2, 8)
    assert loaded.numbers_of_workers() == [2, 4, 8]
    assert recipe.load(path, ["workers.count=2"]).numbers_of_workers() == [2]
