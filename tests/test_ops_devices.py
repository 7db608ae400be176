"""Kernels read every tensor where it lies: all must be on one device, index tensors included."""

import pytest
import torch
from test_ops import arguments

from sbf_dist.layers import SBFConv2d
from sbf_dist.ops import pack_filters

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)


def operators():
    """All operators with tensors that fit: name, arguments by name."""
    z, transforms, sources, order, bias = arguments(2, 4, 5, 6, 7, per_channel=2)
    grad = torch.randn(2, 9, 6, 7)
    wiring = {"sources": sources, "order": order}
    weight = torch.randn(4, 3, 3, 3)
    return {
        "expand": {"z": z, "transforms": transforms, **wiring, "bias": bias},
        "expand_grad_input": {"grad": grad, "transforms": transforms, **wiring},
        "expand_grad_transforms": {"grad": grad, "z": z, **wiring, "size": 3},
        "conv2d": {
            "x": torch.randn(2, 3, 6, 7),
            "weight": weight,
            "transforms": transforms,
            **wiring,
            "bias": bias,
            "residual": grad,
            "stride": (1, 1),
            "padding": (1, 1),
            "dilation": (1, 1),
            "groups": 1,
            "activation": "relu",
            "packed": pack_filters(weight),
        },
    }


PLACES = [
    (operator, name)
    for operator, named in operators().items()
    for name, value in named.items()
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize("elsewhere", ["meta", CUDA])
@pytest.mark.parametrize(("operator", "name"), PLACES)
def test_a_tensor_on_another_device_than_the_others_is_refused(operator, name, elsewhere):
    named = operators()[operator]
    named[name] = named[name].to(elsewhere)
    with pytest.raises(RuntimeError, match=r"\w+ must be on the device of \w+, .*got "):
        getattr(torch.ops.sbf, operator)(**named)


@pytest.mark.parametrize("operator", operators())
def test_all_tensors_on_the_meta_device_give_the_shape_of_the_result(operator):
    named = operators()[operator]
    call = getattr(torch.ops.sbf, operator)
    on_meta = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in named.items()}
    result, expected = call(**on_meta), call(**named)
    assert result.is_meta
    assert result.shape == expected.shape and result.stride() == expected.stride()


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_a_layer_whose_wiring_is_on_the_meta_device_is_refused(grad_enabled):
    layer = SBFConv2d(3, 6, 3, [0, 2, 4], [[0, 2]] * 3)
    layer.sources = layer.sources.to("meta")
    with (
        torch.set_grad_enabled(grad_enabled),
        pytest.raises(RuntimeError, match=r"sources must be on the device of \w, cpu, got meta"),
    ):
        layer(torch.randn(1, 3, 5, 5))
