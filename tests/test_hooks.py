"""Hooks that are removed again."""

import pytest
import torch
from torch import nn

from sbf_dist.hooks import registered


def hooked(model: nn.Module, names: list[str], seen: list[str]):
    return registered(
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
        for name in names
    )


def test_hooks_last_as_long_as_the_block():
    model, seen = nn.Sequential(nn.Identity(), nn.Identity()), []
    with hooked(model, ["0", "1"], seen):
        model(torch.zeros(1))
    model(torch.zeros(1))
    assert seen == ["0", "1"]
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_removed_where_the_block_or_a_registration_fails():
    model = nn.Sequential(nn.Identity())
    with pytest.raises(ZeroDivisionError), hooked(model, ["0"], []):
        raise ZeroDivisionError
    with pytest.raises(AttributeError), hooked(model, ["0", "missing"], []):
        pass
    assert not any(module._forward_hooks for module in model.modules())
