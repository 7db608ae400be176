"""Double on the CPU, which gradient checks use, has kernels of its own: also with epilogues."""

import pytest
import torch

from sbf_dist.ops import ACTIVATIONS, sbf_conv2d, sbf_conv2d_reference


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conv2d_in_double_with_every_epilogue(layout, size, with_bias, with_residual, activation):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(5, 6, 3, 3, dtype=torch.float64)
    transforms = torch.randn(7, 2, size, size, dtype=torch.float64)
    sources, order = torch.randint(0, 5, (7, 2)), torch.randperm(12)
    bias = torch.randn(12, dtype=torch.float64) if with_bias else None
    # In the other layout than x: the kernels must not take it as it lies.
    residual = torch.randn(2, 12, 9, 8, dtype=torch.float64) if with_residual else None
    arguments = (x, weight, transforms, sources, order, bias, residual)
    y = sbf_conv2d(*arguments, padding=(1, 1), activation=activation)
    wanted = sbf_conv2d_reference(*arguments, padding=(1, 1), activation=activation)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=layout)
