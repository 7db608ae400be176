"""The settings of one compression: the sections of a run's recipe, without its trainings."""

import pytest

from sbf_dist import compress_recipe
from sbf_dist.errors import UserError
from sbf_dist.settings import Compression

CONTENT = {
    "model": "cifar_resnet8",
    "weights": "dense.safetensors",
    "data": {"root": "images"},
    "compress": {"macs": 0.5},
}


def settings(*overrides: str) -> compress_recipe.OneShot:
    return compress_recipe.validate(CONTENT, overrides, "command line")


def test_its_sections_are_those_of_a_run_and_overrides_change_them():
    changed = settings("data.image_size=160", "compress.sources=8", "compress.images=48", "seed=1")
    assert (changed.data.image_size, changed.compress.sources) == (160, 8)
    assert (changed.compress.images, changed.seed) == (48, 1)
    assert isinstance(changed.compress, Compression)
    assert changed.compress.budget.given() == {"macs": 0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compress.rounds=3", r"compress: rounds = 3 must be 1 here: there is no training"),
        ("compress.source=3", r"compress\.source is not a known key; did you mean 'sources'\?"),
        ("compress.params=0.5", "give exactly one of macs, params, latency and latency_ms"),
        ("distill.training.steps=1", "distill is not a known key"),
    ],
)
def test_a_mistake_is_one_line(override, message):
    with pytest.raises(UserError, match=message) as error:
        settings(override)
    assert "\n" not in str(error.value)


def test_a_number_of_rounds_that_changes_nothing_is_accepted():
    assert settings("compress.rounds=1") == settings()
