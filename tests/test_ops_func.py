"""torch.func and graphs: `expand` is transformed there as PyTorch's own operators are."""

import gc
import warnings
import weakref

import pytest
import torch
from test_ops import arguments
from torch import func
from torch.autograd import forward_ad

from sbf_dist import ops_gradients
from sbf_dist.layers import SBFConv2d
from sbf_dist.ops import expand, expand_reference, sbf_conv2d, sbf_conv2d_reference

Z, TRANSFORMS, SOURCES, ORDER, BIAS = arguments(3, 3, 4, 5, 4, per_channel=2, dtype=torch.float64)
SEVERAL = torch.stack([TRANSFORMS, TRANSFORMS.flip(0), -TRANSFORMS])


@pytest.fixture(autouse=True)
def no_warnings():
    """An operator without a rule for vmap only warns that it is slow."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of PyTorch itself: also the first derivative in forward mode calls torch.jit.script.
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def loss(function):
    """A function of transforms and z with a third derivative."""
    return lambda transforms, z: function(z, transforms, SOURCES, ORDER, BIAS).pow(3).sum()


def tangent(function):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(Z, Z.cos())
        return forward_ad.unpack_dual(function(dual, TRANSFORMS, SOURCES, ORDER)).tangent


def applied(function, z=Z, transforms=TRANSFORMS, bias=BIAS):
    return function(z, transforms, SOURCES, ORDER, bias)


CASES = {
    "gradient": lambda f: func.grad(loss(f), (0, 1))(TRANSFORMS, Z),
    "gradient of each image": lambda f: func.vmap(func.grad(loss(f), (0, 1)), (None, 0))(
        TRANSFORMS, Z[:, None]
    ),
    "gradient of each of several layers": lambda f: func.vmap(
        func.grad(loss(f), (0, 1)), (0, None)
    )(SEVERAL, Z),
    "each image": lambda f: func.vmap(lambda z: applied(f, z))(Z[:, None]),
    "images along another dimension": lambda f: func.vmap(lambda z: applied(f, z), 1)(Z[:, None]),
    "several transforms": lambda f: func.vmap(lambda t: applied(f, transforms=t))(SEVERAL),
    "several biases": lambda f: func.vmap(lambda b: applied(f, bias=b))(torch.stack([BIAS, -BIAS])),
    "Jacobian backwards": lambda f: func.jacrev(lambda t: applied(f, transforms=t))(TRANSFORMS),
    "Jacobian forwards": lambda f: func.jacfwd(lambda t: applied(f, transforms=t))(TRANSFORMS),
    "forward mode, all inputs": lambda f: func.jvp(
        lambda z, t, b: applied(f, z, t, b), (Z, TRANSFORMS, BIAS), (-Z, TRANSFORMS.sin(), BIAS)
    ),
    "forward mode without torch.func": tangent,
    "Hessian of transforms": lambda f: func.hessian(loss(f))(TRANSFORMS, Z),
    "Hessian of z": lambda f: func.hessian(loss(f), 1)(TRANSFORMS, Z[:1]),
    "mixed derivative": lambda f: func.jacrev(func.jacrev(loss(f), 1), 0)(TRANSFORMS, Z),
}


@pytest.mark.parametrize("case", CASES)
def test_transformed_functions_equal_those_of_the_reference(case):
    torch.testing.assert_close(CASES[case](expand), CASES[case](expand_reference))


@pytest.mark.parametrize("case", ["gradient", "forward mode without torch.func"])
def test_a_pytorch_that_cannot_say_what_is_active_gives_the_same(case, monkeypatch):
    monkeypatch.setattr(ops_gradients, "_is_transforming", lambda: True)
    torch.testing.assert_close(CASES[case](expand), CASES[case](expand_reference))
    leaves = [t.clone().requires_grad_() for t in (Z, TRANSFORMS)]
    loss(expand)(leaves[1], leaves[0]).backward()
    wanted = CASES["gradient"](expand_reference)
    torch.testing.assert_close((leaves[1].grad, leaves[0].grad), wanted)


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0)])
def test_vmap_of_the_whole_layer_equals_the_reference(dims):
    x = torch.randn(3, 1, 2, 6, 5) if dims[0] == 0 else torch.randn(1, 2, 6, 5)
    weight = torch.randn(3, 3, 2, 3, 3) if dims[1] == 0 else torch.randn(3, 2, 3, 3)

    def mapped(function):
        def layer(x, weight):
            return function(x, weight, TRANSFORMS.float(), SOURCES, ORDER, activation="relu")

        return func.vmap(layer, dims)(x, weight)

    torch.testing.assert_close(mapped(sbf_conv2d), mapped(sbf_conv2d_reference))


@pytest.mark.parametrize("function", [func.grad, func.jacfwd, func.hessian])
def test_a_layer_of_torch_func_can_be_differentiated_by_all_its_parameters(function):
    layer = SBFConv2d(2, 7, 3, [0, 2, 4], [[0, 2]] * 4, padding=1).double()
    parameters, x = dict(layer.named_parameters()), torch.randn(1, 2, 3, 4).double()

    def output(parameters):
        return func.functional_call(layer, parameters, x).square().sum()

    found = function(output)(parameters)
    assert set(found) == {"basis.weight", "transforms", "bias"}
    layer(x).square().sum().backward()
    if function is not func.hessian:
        for name, value in layer.named_parameters():
            torch.testing.assert_close(found[name], value.grad)


def test_frozen_transforms_keep_no_features_for_forward_mode_either():
    z = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) * 2
    features = weakref.ref(z)
    y = expand(z, TRANSFORMS, SOURCES, ORDER)
    del z
    gc.collect()
    assert y.requires_grad and features() is None


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_a_traced_layer_does_not_depend_on_the_mode_it_was_traced_in(grad_enabled):
    layer = SBFConv2d(2, 7, 3, [0, 2, 4], [[0, 2]] * 4, padding=1)
    x = torch.randn(3, 2, 6, 5)
    with torch.set_grad_enabled(grad_enabled):
        traced = torch.jit.trace(layer, x[:2])  # traces again and compares
    torch.testing.assert_close(traced(x), layer(x))
    traced(x).sum().backward()
    assert layer.transforms.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_an_exported_layer_takes_other_batches_in_either_mode(grad_enabled):
    layer = SBFConv2d(2, 7, 3, [0, 2, 4], [[0, 2]] * 4, padding=1)
    x = torch.randn(3, 2, 6, 5)
    batch = {0: torch.export.Dim.DYNAMIC}
    with torch.set_grad_enabled(grad_enabled):
        exported = torch.export.export(layer, (x[:2],), dynamic_shapes=(batch,)).module()
    torch.testing.assert_close(exported(x), layer(x))
    with torch.no_grad():
        torch.testing.assert_close(exported(x), layer(x))
