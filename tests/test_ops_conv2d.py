"""The fused inference operator on the CPU against float64: every layout, dtype, epilogue, path."""

import pytest
import torch
from conv2d_problems import (
    LAYOUTS,
    assert_close,
    assert_like_reference,
    in_double,
    problem,
    threads,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sbf_dist import _C
from sbf_dist.ops import ACTIVATIONS, pack_filters, sbf_conv2d, sbf_conv2d_reference


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_every_epilogue(kernel, layout, dtype, activation, with_bias, with_residual):
    assert_like_reference(
        *problem(
            20,
            19,
            30,
            7,
            9,
            kernel=(kernel, kernel),
            padding=(kernel // 2, kernel // 2),
            per_channel=2,
            dtype=dtype,
            layout=layout,
            activation=activation,
            with_bias=with_bias,
            with_residual=with_residual,
        )
    )


CONVOLUTIONS = {
    "1x1": {},
    "1x1 stride": {"stride": (2, 3)},
    "1x1 padding": {"padding": (2, 1)},
    "3x3": {"kernel": (3, 3), "padding": (1, 1)},
    "3x3 no padding": {"kernel": (3, 3)},
    "3x3 stride": {"kernel": (3, 3), "padding": (1, 1), "stride": (2, 2)},
    "3x3 dilation": {"kernel": (3, 3), "padding": (2, 3), "dilation": (2, 3)},
    "3x3 all": {"kernel": (3, 3), "padding": (4, 1), "dilation": (3, 2), "stride": (1, 3)},
    "5x5": {"kernel": (5, 5), "padding": (2, 2)},
    "1x5": {"kernel": (1, 5), "padding": (0, 2), "stride": (2, 1)},
    "even": {"kernel": (2, 4), "padding": (1, 2)},
    "groups": {"kernel": (3, 3), "padding": (1, 1), "groups": 3},
    "depthwise": {"kernel": (3, 3), "padding": (1, 1), "groups": 18},
    "1x1 groups": {"groups": 2, "stride": (2, 2)},
    "padding only": {"kernel": (3, 3), "padding": (11, 13), "stride": (9, 11)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_every_kind_of_convolution(convolution, layout, dtype):
    settings = CONVOLUTIONS[convolution] | {"layout": layout, "dtype": dtype, "per_channel": 2}
    assert_like_reference(*problem(18, 36, 20, 11, 13, with_residual=True, **settings))


# channels, basis, rebuilt, height, width, and settings
SHAPES = {
    "one pixel": (32, 16, 16, 1, 1, {}),
    "one pixel of each image": (40, 24, 9, 1, 1, {"batch": 5, "size": 5}),
    "one row": (8, 16, 16, 1, 40, {}),
    "one column": (8, 16, 16, 40, 1, {"per_channel": 2}),
    "odd width": (16, 32, 32, 7, 7, {"per_channel": 4}),
    "no images": (16, 32, 32, 7, 7, {"batch": 0}),
    "one basis filter": (5, 1, 3, 6, 6, {"per_channel": 2}),
    "fewer filters than lanes": (7, 5, 11, 9, 8, {}),
    "a filter more than lanes": (9, 17, 16, 9, 8, {}),
    "one input channel": (1, 6, 7, 9, 8, {}),
    "all kept": (12, 20, 0, 9, 8, {}),
    "colliding pixels": (512, 20, 25, 5, 6, {}),
    "colliding pixels, many": (1024, 48, 16, 7, 7, {"batch": 3}),
    "filters beyond the cache": (1536, 200, 30, 7, 7, {"batch": 1}),
    "wider than a chunk": (6, 5, 6, 3, 300, {"size": 5}),
    "several tiles": (64, 64, 128, 45, 56, {"batch": 3}),
    "transforms beyond the image": (8, 6, 7, 3, 2, {"size": 7, "per_channel": 3}),
}


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_at_the_edges_of_the_kernels(shape, layout, kernel):
    *sizes, settings = SHAPES[shape]
    assert_like_reference(
        *problem(
            *sizes,
            kernel=(kernel, kernel),
            padding=(kernel // 2, kernel // 2),
            layout=layout,
            **settings,
        )
    )


@pytest.mark.parametrize("per_channel", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 3, 5, 7, 31])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_size_of_transforms(layout, size, per_channel):
    assert_like_reference(
        *problem(16, 18, 21, 9, 10, size=size, per_channel=per_channel, layout=layout)
    )


@st.composite
def convolutions(draw):
    """Draw arguments of `problem` whose padded image is no smaller than the filters."""
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel = draw(st.one_of(st.just((1, 1)), st.just((3, 3)), pair))
    dilation = draw(st.one_of(st.just((1, 1)), pair))
    padding = draw(st.one_of(st.just((0, 0)), st.tuples(st.integers(0, 4), st.integers(0, 4))))
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    size = [
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 14))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    return {
        "channels": groups * draw(st.integers(1, 20)),
        "basis": groups * draw(st.integers(1, 36)),
        "rebuilt": draw(st.integers(0, 36)),
        "height": size[0],
        "width": size[1],
        "batch": draw(st.integers(0, 3)),
        "kernel": kernel,
        "dilation": dilation,
        "padding": padding,
        "stride": draw(st.one_of(st.just((1, 1)), pair)),
        "groups": groups,
        "per_channel": draw(st.integers(1, 4)),
        "size": draw(st.sampled_from([1, 3, 3, 5, 7])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "with_bias": draw(st.booleans()),
        "with_residual": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=60, deadline=None)
@given(arguments=convolutions())
def test_any_convolution_equals_the_reference(arguments):
    assert_like_reference(*problem(**arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_results_do_not_depend_on_the_number_of_threads(batch, kernel, layout, dtype):
    # 6 panels of 16 filters (more of fewer): 2 and 3 threads share an image of them.
    args, settings = problem(
        32,
        96,
        70,
        13,
        11,
        batch=batch,
        kernel=(kernel, kernel),
        padding=(kernel // 2, kernel // 2),
        per_channel=2,
        layout=layout,
        dtype=dtype,
        with_residual=True,
        activation="silu",
    )
    packed = pack_filters(args[1]) if dtype == torch.float32 else None
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(sbf_conv2d(*args, **settings, packed=packed))
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert_close(results[0], sbf_conv2d_reference(*in_double(args), **settings), dtype)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arguments_may_lie_in_memory_as_they_like(layout, kernel):
    args, settings = problem(
        12, 10, 14, 6, 9, kernel=(kernel, kernel), layout=layout, with_residual=True
    )
    x, weight, transforms, sources, order, bias, residual = args
    wanted = sbf_conv2d(*args, **settings)

    def every_second(tensor, dim):
        return tensor.repeat_interleave(2, dim).unfold(dim, 1, 2).squeeze(-1)

    other = next(other for other in LAYOUTS if other != layout)
    variants = {
        "weight": [x, weight.contiguous(memory_format=torch.channels_last), *args[2:]],
        "residual": [*args[:6], residual.contiguous(memory_format=other)],
        "sliced": [
            x,
            every_second(weight, 0),
            every_second(transforms, 3),
            every_second(sources, 0),
            every_second(order, 0),
            every_second(bias, 0),
            every_second(residual, 2),
        ],
        "expanded": [*args[:5], bias[:1].expand_as(bias), residual[:, :, :1].expand_as(residual)],
        "transposed": [x, weight, transforms.mT.contiguous().mT, *args[3:]],
    }
    assert not any(t.is_contiguous() for t in variants["sliced"][1:])
    for name, variant in variants.items():
        if name == "expanded":
            copied = [t.clone(memory_format=torch.contiguous_format) for t in variant]
            expected = sbf_conv2d_reference(*in_double(copied), **settings)
            assert_close(sbf_conv2d(*variant, **settings), expected, x.dtype)
        else:
            assert torch.equal(sbf_conv2d(*variant, **settings), wanted), name
    # Strides of x that are no layout: which one the result has is PyTorch's choice.
    strided = sbf_conv2d(every_second(x, 3), *args[1:], **settings)
    torch.testing.assert_close(strided, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_what_is_not_finite_stays_where_it_belongs(kernel, layout, size, value):
    args, settings = problem(
        24,
        40,
        30,
        22,
        21,
        batch=1,
        kernel=(kernel, kernel),
        padding=(kernel // 2, kernel // 2),
        size=size,
        layout=layout,
    )
    x, order = args[0], args[4]
    spoilt = torch.zeros(1, 1, 22, 21)
    # At the ends of rows and of the image, where neighbours in memory are no neighbours.
    for h, w in [(0, 0), (6, 20), (13, 0), (21, 20)]:
        x[..., h, w] = value
        spoilt[..., h, w] = 1
    touched = torch.nn.functional.max_pool2d
    spoilt = touched(spoilt, kernel, 1, kernel // 2)
    around = touched(spoilt, size, 1, size // 2)
    # Two threads make two tiles of the image: 40 filters are not many enough to be shared.
    with threads(2):
        y = sbf_conv2d(*args, **settings)
    is_kept = (order < 40).view(1, -1, 1, 1)
    assert torch.equal(torch.isfinite(y), torch.where(is_kept, spoilt, around) == 0)
    x.nan_to_num_(nan=0, posinf=0)
    exact = sbf_conv2d_reference(*in_double(args), **settings)
    finite = torch.isfinite(y)
    assert_close(torch.where(finite, y, 0), torch.where(finite, exact, 0), y.dtype)


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish"])
def test_activations_let_nan_pass(activation):
    args, settings = problem(4, 20, 20, 5, 5, activation=activation)
    args[0][0] = float("nan")
    y = sbf_conv2d(*args, **settings)
    assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_what_an_earlier_call_left_in_memory_does_not_matter(kernel, layout):
    args, settings = problem(16, 24, 25, 9, 7, kernel=(kernel, kernel), size=5, layout=layout)
    before = sbf_conv2d(*args, **settings)
    large, _ = problem(16, 24, 25, 60, 50, kernel=(kernel, kernel), size=5, layout=layout)
    large[0].fill_(float("nan"))
    assert sbf_conv2d(*large, **settings).isnan().all()
    assert torch.equal(sbf_conv2d(*args, **settings), before)


def test_packed_filters_are_panels_of_filters_filled_up_with_zeros():
    lanes = _C.build_info()["cpu_lanes"]
    weight = torch.randn(lanes + 3, 5, 2, 3)
    packed = pack_filters(weight)
    assert packed.shape == (2, 30, lanes)
    filters = packed.transpose(1, 2).reshape(2 * lanes, 2, 3, 5).permute(0, 3, 1, 2)
    assert torch.equal(filters[: lanes + 3], weight)
    assert not filters[lanes + 3 :].any()


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_keep_their_contract_with_pytorch(layout, kernel):
    args, _ = problem(6, 8, 9, 7, 6, kernel=(kernel, kernel), layout=layout, with_residual=True)
    rest = ((2, 1), (1, 0), (1, 1), 1, "relu")
    weight = args[1]
    args[6] = sbf_conv2d(*args[:6], stride=rest[0], padding=rest[1])
    for packed in (None, pack_filters(weight)):
        torch.library.opcheck(torch.ops.sbf.conv2d, (*args, *rest, packed))
    torch.library.opcheck(torch.ops.sbf.conv2d, (*args[:5], None, None, *rest, None))
    torch.library.opcheck(torch.ops.sbf.pack_filters, (weight,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operator_compiles_to_one_graph(layout):
    args, settings = problem(
        8, 20, 12, 9, 7, kernel=(3, 3), layout=layout, with_residual=True, activation="silu"
    )

    def network(x, weight, residual):
        y = sbf_conv2d(x * 2, weight, *args[2:6], residual, **settings, packed=pack_filters(weight))
        return y + 1

    inputs = (args[0], args[1], args[6])
    compiled = torch.compile(network, fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), network(*inputs))
