"""What makes two recipes the same run."""

import json
import re
from pathlib import Path

import pytest
import yaml
from minimal_recipe import MINIMAL

from sbf_dist import recipe


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(MINIMAL)
    return tmp_path / "tiny.yaml"


@pytest.mark.parametrize(
    "override",
    ["workers.count=4", "workers.count=[1, 2]", "workers={gpus: 1, max_failures: 0}",
     "checkpoints.keep_last=5", "tracking.experiment=other",
     "tracking.uri=http://localhost:5000", "compress.latency_table=t.json"],
)  # fmt: skip
def test_workers_tracking_and_caches_are_no_part_of_the_identity(path, override):
    assert recipe.load(path, [override]).digest() == recipe.load(path).digest()


@pytest.mark.parametrize(
    "override",
    ["name=other", "seed=1", "data.image_size=24", "teachers.0.model=cifar_resnet20",
     "pseudo_labels.top_k=3", "compress.macs=0.4", "compress.latency_batch=2",
     "compress.criterion=l1", "compress.keep=[conv]", "compress.round_to=8",
     "distill.label_weight=0.1", "baselines={steps: 9}"],
)  # fmt: skip
def test_all_else_is_part_of_the_identity(path, override):
    assert recipe.load(path, [override]).digest() != recipe.load(path).digest()


def test_the_digest_does_not_depend_on_how_the_recipe_is_written(path, tmp_path):
    content = yaml.safe_load(MINIMAL)
    content["compress"]["sources"] = 4  # its default
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps(dict(reversed(content.items()))))
    assert recipe.load(other).digest() == recipe.load(path).digest()
    assert re.fullmatch("[0-9a-f]{64}", recipe.load(path).digest())


def test_what_is_cached_is_no_part_of_the_identity_and_how_images_vary_is(path):
    plain = recipe.load(path)
    for cache in ("cache=memory", "cache_dir=/disk", "cache_gb=5"):
        assert recipe.load(path, [f"data.{cache}"]).digest() == plain.digest()
    assert "cache_dir" not in plain.model_dump()["data"]  # earlier versions did not have it
    for change in ("crop=padded", "rand_augment=2", "mixup=0.2", "cutmix=1.0"):
        other = recipe.load(path, [f"data.augmentation.{change}"])
        assert other.digest() != plain.digest()
        assert other.data.augmentation.mixes == change.startswith(("mixup", "cutmix"))


def test_keys_that_earlier_versions_did_not_have_are_not_stored_at_their_defaults(path):
    stored = recipe.load(path).identity()["distill"]["training"]
    assert stored.keys() == {
        "steps",
        "batch_size",
        "accumulation",
        "optimizer",
        "schedule",
        "warmup",
        "precision",
        "zero_stage",
        "log_every",
        "checkpoint_every",
    }


def test_a_weight_that_changes_is_in_the_identity_as_it_is_written(path, recwarn):
    loaded = recipe.load(path, ["distill.label_weight=[1, 0.5]", "distill.teacher_weight=[1, 0]"])
    assert loaded.distill.label_weight == (1.0, 0.5)
    identity = loaded.identity()
    assert identity["distill"]["label_weight"] == [1.0, 0.5]
    assert type(loaded).model_validate(identity | {"workers": {}}) == loaded
    assert not recwarn
    assert (
        recipe.load(path, ["distill.label_weight=1"]).identity()["distill"]["label_weight"] == 1.0
    )


def test_parts_that_are_off_are_not_in_the_identity(path):
    distill = recipe.load(path).identity()["distill"]
    assert not {"teacher_weight", "consistency", "features", "labels_last"} & distill.keys()
