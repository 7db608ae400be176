import copy
import logging
import operator
import pickle
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from students import randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sbf_dist import models
from sbf_dist.export.fused import FusedConv2d, FusedSBFConv2d
from sbf_dist.export.optimize import optimize
from sbf_dist.layers import SBFConv2d
from sbf_dist.ops import pack_filters

ACTIVATIONS = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
}


def random_sbf_layer(conv: nn.Conv2d, slots: int = 2) -> SBFConv2d:
    """An SBF layer of half the filters of `conv`, wired at random."""
    channels = conv.out_channels
    kept = sorted(torch.randperm(channels)[: channels // 2].tolist())
    picks = [torch.randperm(len(kept))[:slots].tolist() for _ in range(channels - len(kept))]
    layer = SBFConv2d.from_conv(conv, kept, [[kept[i] for i in row] for row in picks])
    with torch.no_grad():
        layer.transforms.add_(0.1 * torch.randn_like(layer.transforms))
    return layer


def with_random_sbf_layers(name: str, image: int) -> nn.Module:
    """A network by name, every second convolution an SBF layer, norms as after training."""
    torch.manual_seed(0)
    model = models.build(name, 10)
    convolutions = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Conv2d and module.groups == 1 and module.out_channels >= 8
    ]
    for name_of_layer, conv in convolutions[1::2]:
        model.set_submodule(name_of_layer, random_sbf_layer(conv), strict=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(16, 3, image, image))
    return model.eval()


def check_agreement(optimized: nn.Module, model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        expected = model(x)
        found = optimized(x)
    bound = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=bound)


def kinds(model: nn.Module) -> Counter:
    return Counter(type(module) for module in model.modules())


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


class Block(nn.Module):
    """activation(conv(x) + shortcut(x)), written in a given way."""

    def __init__(self, sbf: bool, after: Callable, add: Callable, **settings) -> None:
        super().__init__()
        torch.manual_seed(0)
        settings = {"kernel_size": 3, "padding": 1} | settings
        self.conv: nn.Module = nn.Conv2d(4, 8, **settings)
        if sbf:
            self.conv = random_sbf_layer(self.conv)
        self.shortcut = nn.Conv2d(4, 8, 1, stride=settings.get("stride", 1))
        self.add = add
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.after(self.add(y, self.shortcut(x)))


def fused(optimized: nn.Module, name: str = "conv") -> FusedConv2d | FusedSBFConv2d:
    layer = optimized.get_submodule(name)
    assert isinstance(layer, FusedConv2d | FusedSBFConv2d)
    return layer


def operators(optimized: nn.Module) -> int:
    return sum(node.op.startswith("call") for node in optimized.graph.nodes)


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


class WritesItsInput(nn.Module):
    """Between the convolution and the addition, its input is overwritten."""

    def __init__(self, write: Callable) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = random_sbf_layer(nn.Conv2d(8, 8, 3, padding=1))
        self.relu = nn.ReLU(inplace=True)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.conv(x)
        return y + self.write(self, x)


@pytest.mark.parametrize(
    "write",
    [
        lambda model, x: model.relu(x),
        lambda model, x: F.relu(x, True),
        lambda model, x: F.silu(x, inplace=True),
        lambda model, x: x.relu_(),
        lambda model, x: torch.relu_(x),
        lambda model, x: operator.iadd(x, 1),
    ],
)
def test_input_that_is_overwritten_before_the_addition_is_read_before_it(write: Callable) -> None:
    model = WritesItsInput(write).eval()
    check_agreement(optimize(model), model, torch.randn(2, 8, 9, 7))


@pytest.mark.parametrize("sbf", [True, False])
def test_residual_is_overwritten_by_its_last_reader_only(sbf: bool) -> None:
    class Blocks(nn.Module):
        """Two residual blocks; the input of the second is read again after it, or not."""

        def __init__(self, again: Callable) -> None:
            super().__init__()
            torch.manual_seed(0)
            convolutions = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)]
            if sbf:
                convolutions[1] = random_sbf_layer(convolutions[1])
            self.first, self.second, self.third, self.last = convolutions
            self.again = again

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            y = F.relu(self.third(F.relu(self.second(x))) + x)
            return self.last(y) + y + self.again(x)

    def overwrites(again: Callable, name: str) -> bool:
        model = Blocks(again).eval()
        optimized = optimize(model)
        x = torch.randn(2, 8, 9, 7)
        check_agreement(optimized, model, x)
        check_agreement(optimized, model, x.contiguous(memory_format=torch.channels_last))
        return fused(optimized, name).overwrites_residual

    assert overwrites(lambda x: 0, "third")
    assert not overwrites(lambda x: 0, "last")  # its image is its residual
    assert not overwrites(lambda x: x, "third")
    assert not overwrites(lambda x: x.flatten(2).view_as(x), "third")


def test_input_of_the_network_is_never_overwritten() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x) + x
            return F.relu(self.second(y) + y.view(y.shape))

    optimized = optimize(Residual().eval())
    x = torch.randn(2, 4, 9, 7).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with torch.inference_mode():
        optimized(x)
    assert torch.equal(x, before)


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
