"""Hooks that are removed again."""

import pytest
import torch
from torch import nn

from sbf_dist.hooks import leaves, on_input, on_output, registered


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


def call_by_keyword(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(input=images)


@pytest.mark.parametrize("call", [nn.Module.__call__, call_by_keyword])
def test_hooks_are_told_the_input_however_it_is_given(call):
    model, images, seen = nn.Linear(2, 2), torch.ones(1, 2), []
    with registered([on_input(model, lambda _, given: seen.append(given))]):
        output = call(model, images)
    with registered([on_output(model, lambda _, *given: seen.extend(given))]):
        call(model, images)
    assert seen[0] is images and seen[1] is images
    assert torch.equal(seen[2], output)


@pytest.mark.parametrize("call", [nn.Module.__call__, call_by_keyword])
def test_what_hooks_return_takes_the_place_of_input_and_output(call):
    model, images = nn.Identity(), torch.ones(1)
    with registered([on_input(model, lambda _, given: given + 1)]):
        assert call(model, images) == 2
    with registered([on_output(model, lambda _, given, output: given + output + 1)]):
        assert call(model, images) == 3


@pytest.mark.parametrize("call", [nn.Module.__call__, call_by_keyword])
def test_inputs_become_leaves_however_they_are_given(call):
    model = nn.Sequential(nn.Linear(2, 2))
    with leaves(model, ["0"]) as found:
        output = call(model[0], torch.ones(1, 2))
        assert output.requires_grad and len(found) == 1
