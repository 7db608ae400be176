"""What the fused inference operator refuses, and what it costs."""

import pytest
import torch
from conv2d_problems import problem
from torch.utils.flop_counter import FlopCounterMode

from sbf_dist import _C
from sbf_dist.ops import pack_filters, sbf_conv2d


@pytest.mark.parametrize("place", [0, 1, 2, 5, 6])
def test_gradients_are_refused(place):
    args, settings = problem(4, 5, 6, 7, 8, with_residual=True)
    args[place].requires_grad_()
    y = sbf_conv2d(*args, **settings)
    with pytest.raises(RuntimeError, match="derivative for sbf::conv2d is not implemented"):
        y.sum().backward()


@pytest.mark.parametrize("groups", [1, 2])
def test_flops_are_two_per_multiply_add(groups):
    args, settings = problem(
        8, 4, 6, 9, 7, kernel=(3, 5), per_channel=3, size=5, groups=groups, stride=(2, 1)
    )
    with FlopCounterMode(display=False) as counter:
        y = sbf_conv2d(*args, **settings)
    assert y.shape == (2, 10, 4, 3)
    assert counter.get_total_flops() == 2 * 2 * 4 * 3 * (4 * 8 // groups * 15 + 6 * 3 * 25)


def replaced(**changes):
    """Change named arguments of the operator."""
    return lambda named: named | {name: change(named[name]) for name, change in changes.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(x=lambda t: t[0]), r"x must have 4 dimensions .*got shape \[6, 5, 7\]"),
        (replaced(x=lambda t: t[:, :4]), r"x must have 6 channels, .*, got 4"),
        (replaced(x=lambda t: t[:, :, :2]), r"x must be no smaller than the filters.*, 3 with"),
        (replaced(x=lambda t: t.bfloat16()), r"transforms must have the dtype of x, BFloat16"),
        (
            replaced(weight=lambda t: t[:3]),
            r"weight must have shape .* B = 4, .*\[3, 3, 3, 3\]",
        ),
        (replaced(weight=lambda t: t[0]), r"weight must have shape .*got \[3, 3, 3\]"),
        (replaced(weight=lambda t: t.double()), r"weight must have the dtype of x, Float"),
        (replaced(weight=lambda t: t[:, :0]), r"at least one value, got shape \[4, 0, 3, 3\]"),
        (replaced(weight=lambda t: t[:, :, :0]), r"at least one value, got shape \[4, 3, 0, 3\]"),
        (replaced(transforms=lambda t: t[..., :2]), r"transforms must have shape"),
        (replaced(sources=lambda t: t + 4), r"sources must lie in \[0, 4\)"),
        (replaced(order=lambda t: t * 0), r"order must be a permutation of 0..8, got 0 twice"),
        (replaced(bias=lambda t: t[1:]), r"bias must have shape \(9,\), got \[8\]"),
        (replaced(bias=lambda t: t.half()), r"bias must have the dtype of x"),
        (replaced(residual=lambda t: t[..., 1:]), r"residual must have shape \[2, 9, 3, 5\], got"),
        (replaced(residual=lambda t: t[:1]), r"residual must have shape"),
        (replaced(residual=lambda t: t.double()), r"residual must have the dtype of x, Float"),
        (replaced(groups=lambda _: 3), r"groups must divide the 4 basis filters, got 3"),
        (replaced(groups=lambda _: 0), r"groups must divide the 4 basis filters, got 0"),
        (replaced(groups=lambda _: 1), r"x must have 3 channels, .*got 6"),
        (replaced(stride=lambda _: (0, 1)), r"stride must be two numbers of at least 1"),
        (replaced(padding=lambda _: (-1, 0)), r"padding must be two numbers of at least 0"),
        (replaced(dilation=lambda _: (1, 0)), r"dilation must be two numbers of at least 1"),
        (
            replaced(activation=lambda _: "gelu"),
            r"activation must be one of none, .*got gelu",
        ),
        (
            replaced(packed=lambda _: pack_filters(torch.randn(4, 2, 3, 3))),
            r"packed must be pack_filters\(weight\) of this CPU",
        ),
        (
            replaced(packed=lambda _: torch.zeros(1, 27, _C.build_info()["cpu_lanes"]).double()),
            r"packed must be pack_filters\(weight\) of this CPU",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    args, _ = problem(6, 4, 5, 5, 7, kernel=(3, 3), groups=2, with_residual=True)
    names = ["x", "weight", "transforms", "sources", "order", "bias", "residual"]
    named = dict(zip(names, args, strict=True)) | {
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "groups": 2,
        "activation": "none",
        "packed": None,
    }
    torch.ops.sbf.conv2d(**named)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sbf.conv2d(**change(named))


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.zeros(2, 2, 1, 1).double()])
def test_filters_that_cannot_be_packed_are_named(weight):
    with pytest.raises(RuntimeError, match="weight must be float of shape"):
        pack_filters(weight)
