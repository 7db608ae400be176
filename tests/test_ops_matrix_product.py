"""Rebuilt channels of m = 1 and many sources: summed in tiles or, where large, matrix products."""

import pytest
import torch
from test_ops import DEVICES, LAYOUTS, TOLERANCES, arguments, assert_like_reference
from test_ops_conv2d import assert_like_reference as assert_conv2d_like_reference
from test_ops_conv2d import problem

from sbf_dist import _C
from sbf_dist.ops import ACTIVATIONS, expand

SOURCES = [8, 9, 12, 20]  # the first is gathered; of 20, some basis channel is drawn twice
SIZES = [(7, 5), (61, 65)]  # of 35 channels from 12: by tiles, and beyond MAX_TILE_MULTIPLY_ADDS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_channel", SOURCES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_output_and_gradients_equal_the_reference(size, layout, dtype, per_channel, device):
    shape = (2, 12, 23, *size)
    assert (2 * 12 * 35 * size[0] * size[1] > _C.MAX_TILE_MULTIPLY_ADDS) == (size == SIZES[1])
    case = arguments(
        *shape, per_channel=per_channel, size=1, dtype=dtype, layout=layout, device=device
    )
    assert_like_reference(*case)


@pytest.mark.parametrize("shape", [(0, 12, 3, 4, 4), (2, 12, 0, 3, 3), (1, 9, 1, 1, 1)])
def test_nothing_to_do_is_done(shape):
    assert_like_reference(*arguments(*shape, per_channel=12, size=1))


def test_features_that_lie_scattered_in_memory_are_taken():
    z, *rest = arguments(2, 12, 5, 8, 6, per_channel=12, size=1)
    scattered = torch.empty(6, 12, 2, 8).permute(2, 1, 3, 0).copy_(z)
    assert_like_reference(scattered, *rest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_finite_differences_to_second_order(layout, device):
    z, transforms, sources, order, bias = arguments(
        2, 10, 3, 3, 2, per_channel=10, size=1, dtype=torch.float64, layout=layout, device=device
    )
    for leaf in (z, transforms, bias):
        leaf.requires_grad_()
    inputs = (z, transforms, sources, order, bias)
    assert torch.autograd.gradcheck(expand, inputs)
    assert torch.autograd.gradgradcheck(expand, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 10, 5, 4, 7), (0, 10, 2, 4, 4), (2, 10, 0, 3, 3)])
def test_operators_keep_their_contract_with_pytorch(shape, layout, device):
    z, transforms, sources, order, bias = arguments(
        *shape, per_channel=10, size=1, layout=layout, device=device
    )
    grad = torch.randn_like(expand(z, transforms, sources, order))
    for leaf in (z, transforms, bias, grad):
        leaf.requires_grad_()
    torch.library.opcheck(torch.ops.sbf.expand, (z, transforms, sources, order, bias))
    torch.library.opcheck(torch.ops.sbf.expand_grad_input, (grad, transforms, sources, order))
    torch.library.opcheck(torch.ops.sbf.expand_grad_transforms, (grad, z, sources, order, 1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(6, 5), (95, 93)])
def test_the_whole_layer_equals_the_reference(
    size, dtype, kernel, layout, with_residual, activation
):
    case = problem(
        7, 12, 9, *size,
        kernel=kernel,
        padding=(kernel[0] // 2, kernel[1] // 2),
        per_channel=12,
        size=1,
        dtype=dtype,
        layout=layout,
        with_residual=with_residual,
        activation=activation,
    )  # fmt: skip
    assert_conv2d_like_reference(*case)
