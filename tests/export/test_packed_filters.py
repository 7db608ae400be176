"""Filters of optimized networks, which are packed once."""

import copy
import operator
import pickle

import pytest
import torch
from fused_networks import Block, check_agreement, fused, with_random_sbf_layers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sbf_dist.export.optimize import optimize
from sbf_dist.ops import pack_filters


def packed_filters_used(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """The packed filters that each call of the fused operator was given."""
    used = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.sbf.conv2d.default:
                used.append(args[-1])
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Record():
        model(x)
    return used


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_filters_are_packed_once(layout: torch.memory_format, kernel: int) -> None:
    model = Block(True, nn.ReLU(), operator.add, kernel_size=kernel, padding=kernel // 2).eval()
    optimized = optimize(model)
    x = torch.randn(2, 4, 9, 7).contiguous(memory_format=layout)
    layer = fused(optimized)
    assert torch.equal(layer.packed, pack_filters(layer.weight))
    for _ in range(2):
        (used,) = packed_filters_used(optimized, x)
        assert used is layer.packed
    check_agreement(optimized, model, x)
    # They are what is read, not the filters: all zero, they leave the bias, whatever the image.
    if layout == torch.channels_last:
        layer.packed.zero_()
        residual = torch.zeros(2, 8, 9, 7).contiguous(memory_format=layout)
        y = layer(x, residual)
        assert torch.equal(y, F.relu(layer.bias).view(1, -1, 1, 1).expand_as(y))


def test_filters_that_are_loaded_are_packed_anew() -> None:
    one, other = (Block(True, nn.ReLU(), operator.add).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    one, other = optimize(one), optimize(other)
    x = torch.randn(2, 4, 9, 7).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = other(x)
        assert not torch.equal(one(x), wanted)
        one.load_state_dict(other.state_dict())
        assert torch.equal(one(x), wanted)


def test_layers_with_groups_have_no_packed_filters() -> None:
    model = Block(True, nn.ReLU(), operator.add, groups=2).eval()
    optimized = optimize(model)
    assert fused(optimized).packed is None
    check_agreement(optimized, model, torch.randn(2, 4, 9, 7))


def test_packed_filters_follow_copies_and_conversions_and_are_no_state() -> None:
    model = Block(True, nn.SiLU(), operator.add).eval()
    optimized = optimize(model)
    x = torch.randn(2, 4, 9, 7).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        before = optimized(x)
    copied = copy.deepcopy(optimized)
    assert fused(copied).packed is not fused(optimized).packed
    for other in (copied, pickle.loads(pickle.dumps(optimized))):
        (used,) = packed_filters_used(other, x)
        assert torch.equal(used, fused(optimized).packed)
        with torch.no_grad():
            assert torch.equal(other(x), before)

    state = optimized.state_dict()
    assert not any("packed" in name for name in state)
    copied.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(copied(x), before)

    for dtype in (torch.float64, torch.bfloat16):
        converted = copy.deepcopy(optimized).to(dtype)
        assert packed_filters_used(converted, x.to(dtype)) == [None]
        with torch.no_grad():
            found, wanted = converted(x.to(dtype)), copy.deepcopy(model).to(dtype)(x.to(dtype))
        tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_optimized_network_is_copied_and_pickled_after_its_first_call() -> None:
    model = with_random_sbf_layers("cifar_resnet8", 32)
    optimized = optimize(model)
    x = torch.randn(2, 3, 32, 32)
    check_agreement(optimized, model, x)
    check_agreement(copy.deepcopy(optimized), model, x)
    check_agreement(pickle.loads(pickle.dumps(optimized)), model, x)
