"""The settings of the library's parts."""

import re

import pytest

from sbf_dist.budget import Budget
from sbf_dist.errors import UserError
from sbf_dist.recipe import Compress
from sbf_dist.settings import Augmentation, Compression, Optimizer, View


def test_a_wrong_value_is_answered_in_one_line():
    with pytest.raises(UserError, match=r"^Compression: macs = 1.5 must be a share"):
        Compression(macs=1.5)
    with pytest.raises(UserError, match=r"^Optimizer: lr = 0 must be greater than 0"):
        Optimizer(lr=0)
    with pytest.raises(UserError, match=r"flipp is not a known key; did you mean .flip.\?"):
        Augmentation(flipp=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": "square"}, "crop = 'square' must be 'resized' or 'padded'"),
        ({"min_scale": 0}, "min_scale = 0 must be greater than 0"),
        ({"max_scale": 1.1}, "max_scale = 1.1 must be less than or equal to 1"),
        ({"min_scale": 0.9, "max_scale": 0.5}, "min_scale = 0.9 must not be above max_scale = 0.5"),
        ({"min_ratio": 2, "max_ratio": 1}, "min_ratio = 2.0 must not be above max_ratio = 1.0"),
        ({"padding": 1025}, "padding = 1025 must be less than or equal to 1024"),
        ({"rotate": 181}, "rotate = 181 must be less than or equal to 180"),
        ({"shift": -0.1}, "shift = -0.1 must be greater than or equal to 0"),
        ({"color": float("nan")}, "color = nan must be a finite number"),
        ({"rand_augment": 17}, "rand_augment = 17 must be less than or equal to 16"),
        ({"magnitude": 31}, "magnitude = 31 must be less than or equal to 30"),
        ({"cutmix": -1}, "cutmix = -1 must be greater than or equal to 0"),
    ],
)
def test_an_augmentation_out_of_its_range_is_named(arguments, message):
    with pytest.raises(UserError, match=f"^Augmentation: {re.escape(message)}"):
        Augmentation(**arguments)


def test_a_view_has_a_size_and_a_deviation_above_0():
    with pytest.raises(UserError, match=r"^View: std.1 = 0 must be greater than 0"):
        View(image_size=8, mean=(0, 0, 0), std=(1, 0, 1))
    with pytest.raises(UserError, match=r"^View: image_size = 0 must be greater than or equal"):
        View(image_size=0, mean=(0, 0, 0), std=(1, 1, 1))


def test_the_budget_is_exactly_one():
    assert Compression(latency_ms=3).budget == Budget(latency_ms=3)
    with pytest.raises(UserError, match="latency_ms; nothing is given"):
        Compression()
    with pytest.raises(UserError, match=r"not macs = 0\.5 and params = 0\.5"):
        Compression(macs=0.5, params=0.5)


def test_another_budget_leaves_the_other_settings():
    settings = Compression(macs=0.5, sources=2).with_budget(Budget(params=0.3))
    assert settings == Compression(params=0.3, sources=2)


def test_a_recipe_section_is_the_settings_and_what_a_run_knows():
    section = Compress(macs=0.5, teacher="t", rounds=2)
    assert isinstance(section, Compression)
    assert section.with_budget(Budget(macs=0.7)).rounds == 2
