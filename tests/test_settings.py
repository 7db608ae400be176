"""The settings of the library's parts."""

import pytest

from sbf_dist.budget import Budget
from sbf_dist.errors import UserError
from sbf_dist.recipe import Compress
from sbf_dist.settings import Augmentation, Compression, Optimizer


def test_a_wrong_value_is_answered_in_one_line():
    with pytest.raises(UserError, match=r"^Compression: macs = 1.5 must be a share"):
        Compression(macs=1.5)
    with pytest.raises(UserError, match=r"^Optimizer: lr = 0 must be greater than 0"):
        Optimizer(lr=0)
    with pytest.raises(UserError, match="flipp is not a known key; did you mean 'flip'"):
        Augmentation(flipp=True)


def test_the_budget_is_exactly_one():
    assert Compression(latency_ms=3).budget == Budget(latency_ms=3)
    with pytest.raises(UserError, match="latency_ms; none is given"):
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
