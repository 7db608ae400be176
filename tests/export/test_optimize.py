import copy
import logging
import operator
from collections.abc import Callable

import pytest
import torch
from fused_networks import (
    ACTIVATIONS,
    Block,
    check_agreement,
    fused,
    kinds,
    operators,
    random_sbf_layer,
    with_random_sbf_layers,
)
from students import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.export.fused import FusedConv2d, FusedSBFConv2d
from sbf_dist.export.optimize import optimize
from sbf_dist.layers import SBFConv2d


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("cifar_resnet20", 32),
        ("torchvision:resnet50", 64),
        ("torchvision:mobilenet_v3_small", 64),
        ("torchvision:efficientnet_b0", 64),
        ("torchvision:vgg16_bn", 32),
        ("torchvision:densenet121", 64),
        ("timm:mobilenetv3_small_050", 64),
    ],
)
def test_networks_agree_with_what_they_were_made_from(name: str, image: int) -> None:
    model = with_random_sbf_layers(name, image)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimized = optimize(model)
    found = kinds(optimized)
    assert not found[SBFConv2d] and not found[nn.Conv2d]
    assert found[FusedSBFConv2d] == kinds(model)[SBFConv2d]
    check_agreement(optimized, model, torch.randn(3, 3, image, image))
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["torchvision:resnet50", "cifar_resnet20", "timm:resnet18", "torchvision:mobilenet_v2"]
)
def test_nothing_is_left_outside_the_convolutions_of_residual_networks(name: str) -> None:
    optimized = optimize(with_random_sbf_layers(name, 32))
    left = {
        type(optimized.get_submodule(str(node.target)))
        if node.op == "call_module"
        else getattr(node.target, "__name__", node.target)
        for node in optimized.graph.nodes
        if node.op.startswith("call")
    }
    known = {FusedConv2d, FusedSBFConv2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Linear, nn.Flatten}
    assert left <= known | {"flatten", "mean", "adaptive_avg_pool2d"}


@pytest.mark.parametrize("sbf", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_activation_is_fused_with_a_residual(sbf: bool, activation: str, stride: int) -> None:
    model = Block(sbf, ACTIVATIONS[activation](), operator.add, stride=stride).eval()
    optimized = optimize(model)
    assert fused(optimized).activation == activation
    assert operators(optimized) == 2
    check_agreement(optimized, model, torch.randn(2, 4, 9, 7))


@pytest.mark.parametrize(
    "after",
    [
        nn.ReLU(inplace=True),
        F.relu,
        F.relu_,
        torch.relu,
        lambda y: F.relu(y, inplace=True),
        lambda y: y.relu(),
        lambda y: y.relu_(),
        F.silu,
        lambda y: F.hardswish(y, inplace=True),
        F.relu6,
    ],
)
@pytest.mark.parametrize(
    "add",
    [
        operator.add,
        operator.iadd,
        torch.add,
        lambda y, r: y.add_(r),
        lambda y, r: y.add(r),
        lambda y, r: r + y,
    ],
)
def test_all_ways_to_write_activation_and_addition_are_fused(
    after: Callable, add: Callable
) -> None:
    model = Block(True, after, add).eval()
    optimized = optimize(model)
    assert operators(optimized) == 2
    check_agreement(optimized, model, torch.randn(2, 4, 9, 7))


@pytest.mark.parametrize("sbf", [True, False])
@pytest.mark.parametrize(
    "add",
    [
        lambda y, r: torch.add(y, r, alpha=2),
        lambda y, r: r.add_(y) + r,
        lambda y, r: y + y,
        lambda y, r: y + 1,
        lambda y, r: y * r,
        lambda y, r: (y + r) + y.sigmoid(),
    ],
)
def test_what_is_no_plain_residual_stays_outside(sbf: bool, add: Callable) -> None:
    model = Block(sbf, nn.ReLU(), add).eval()
    optimized = optimize(model)
    assert fused(optimized).activation == "none"
    check_agreement(optimized, model, torch.randn(2, 4, 9, 7))


@pytest.mark.parametrize("sbf", [True, False])
@pytest.mark.parametrize(
    "shrink",
    [
        lambda r: r.mean((2, 3), keepdim=True),
        lambda r: r[:1],
        lambda r: r[:, :1],
        lambda r: r.double(),
    ],
)
def test_residual_of_another_shape_or_type_is_broadcast(sbf: bool, shrink: Callable) -> None:
    model = Block(sbf, nn.ReLU(), lambda y, r: y + shrink(r)).eval()
    check_agreement(optimize(model), model, torch.randn(2, 4, 9, 7))


def test_layer_that_is_called_twice_keeps_its_epilogues_outside() -> None:
    class Twice(Block):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x)) + self.conv(x + 1)

    model = Twice(True, nn.ReLU(), operator.add).eval()
    check_agreement(optimize(model), model, torch.randn(2, 4, 9, 7))


@pytest.mark.parametrize("sbf", [True, False])
@pytest.mark.parametrize("padding", ["same", "valid", 2, (1, 0)])
def test_paddings_are_fused(sbf: bool, padding: object) -> None:
    model = Block(sbf, nn.ReLU(), lambda y, r: y, padding=padding).eval()
    optimized = optimize(model)
    assert fused(optimized).activation == "relu"
    check_agreement(optimized, model, torch.randn(2, 4, 9, 7))


@pytest.mark.parametrize("sbf", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{"padding_mode": "reflect"}, {"padding": "same", "kernel_size": (2, 3)}],
)
def test_other_paddings_stay_as_they_are(sbf: bool, settings: dict) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, **({"kernel_size": 3, "padding": 1} | settings))
    model = nn.Sequential(random_sbf_layer(conv) if sbf else conv, nn.ReLU()).eval()
    optimized = optimize(model)
    assert type(optimized.get_submodule("0")) is type(model[0])
    check_agreement(optimized, model, torch.randn(2, 4, 9, 7))


def test_layer_with_hidden_basis_features_is_fused() -> None:
    class Folded(Block):
        def __init__(self) -> None:
            super().__init__(True, nn.ReLU(), operator.add)
            self.norm = randomise(nn.BatchNorm2d(8))
            with torch.no_grad():
                self.norm.weight[list(self.conv.kept)] = 0

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return self.after(y + self.shortcut(x)) + self.after(self.norm2(self.conv2(x)))

    model = Folded()
    model.conv2, model.norm2 = copy.deepcopy(model.conv), copy.deepcopy(model.norm)
    model.eval()
    optimized = optimize(model)
    assert len(fused(optimized).order) > fused(optimized).out_channels
    assert operators(optimized) == 4
    check_agreement(optimized, model, torch.randn(2, 4, 9, 7))


class BranchOnData(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(y) if y.sum() > 0 else -y


def test_network_that_cannot_be_traced_has_its_layers_fused_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = BranchOnData(True, nn.ReLU(), operator.add).eval()
    with caplog.at_level(logging.WARNING):
        optimized = optimize(model)
    assert "BranchOnData cannot be traced" in caplog.text
    assert fused(optimized).activation == "none"
    check_agreement(optimized, model, torch.randn(2, 4, 9, 7))


def test_double_precision_and_other_inputs_than_the_first_are_right() -> None:
    model = Block(False, nn.SiLU(), operator.add).eval()
    optimized = optimize(model)
    for shape in ((1, 4, 9, 7), (5, 4, 20, 20), (3, 4, 1, 1)):
        check_agreement(optimized, model, torch.randn(shape))
        check_agreement(
            optimized, model, torch.randn(shape).contiguous(memory_format=torch.channels_last)
        )
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(copy.deepcopy(optimized).double()(x), model.double()(x))


class Clip(nn.Module):
    """Convolves over time first, and adds a grid: tensors of five axes."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Conv3d(1, 4, 3, padding=1)
        self.conv = nn.Conv2d(16, 8, 3, padding=1)
        self.register_buffer("grid", torch.randn(1, 2, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.time(x[:, None]).flatten(1, 2)).relu()
        return y.unflatten(1, (2, 4)) * self.grid


def test_tensors_of_five_axes_keep_their_layout() -> None:
    model = Clip().eval()
    optimized = optimize(model)
    assert fused(optimized).activation == "relu"
    check_agreement(optimized, model, torch.randn(2, 4, 9, 7))


@pytest.mark.slow
@pytest.mark.parametrize("freezing", [True, False])
def test_network_compiles_as_one_graph_with_its_sbf_layers_opaque(freezing: bool) -> None:
    from torch._inductor import config

    model = with_random_sbf_layers("cifar_resnet8", 32)
    optimized = optimize(model)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    torch.compiler.reset()
    with config.patch(freezing=freezing), torch.no_grad():
        compiled = torch.compile(optimized, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        check_agreement(optimized, model, x)  # eager beside it
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
