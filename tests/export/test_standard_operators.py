import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist import models
from sbf_dist.export.fold import fold_batchnorm
from sbf_dist.export.standard_operators import (
    ConcatExpand,
    DepthwiseExpand,
    ProductExpand,
    with_standard_operators,
)
from sbf_dist.layers import SBFConv2d


def random_layer(
    inputs: int, channels: int, *, kept: int, slots: int, m: int = 3, k: int = 3, **settings
) -> SBFConv2d:
    chosen = sorted(torch.randperm(channels)[:kept].tolist())
    sources = [
        [chosen[i] for i in torch.randint(kept, (slots,)).tolist()] for _ in range(channels - kept)
    ]
    layer = SBFConv2d(inputs, channels, k, chosen, sources, m, padding=k // 2, **settings)
    nn.init.normal_(layer.transforms)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer.double().eval()


def images(channels: int = 4) -> Tensor:
    return torch.randn(2, channels, 9, 7, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    kept=st.integers(1, 8),
    slots=st.integers(1, 5),
    m=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_all_forms_equal_the_layer(
    kept: int, slots: int, m: int, stride: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = random_layer(4, 8, kept=kept, slots=slots, m=m, stride=stride, bias=bias)
    x = images()
    expected = layer(x)
    torch.testing.assert_close(DepthwiseExpand(layer)(x), expected)
    if kept < 8:
        torch.testing.assert_close(ConcatExpand(layer, in_order=True)(x), expected)
        free = ConcatExpand(layer, in_order=False)(x)
        torch.testing.assert_close(free[:, layer.order], expected)
    if m == 1:
        torch.testing.assert_close(ProductExpand(layer)(x), expected)


@pytest.mark.parametrize(
    ("slots", "form"), [(1, DepthwiseExpand), (2, DepthwiseExpand), (3, ProductExpand)]
)
def test_layers_that_read_most_of_the_basis_are_products(slots: int, form: type) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(random_layer(4, 8, kept=4, slots=slots, m=1))
    portable = with_standard_operators(model)
    assert type(portable[0]) is form
    x = images()
    torch.testing.assert_close(portable(x), model(x))


@pytest.mark.parametrize(
    ("kept", "slots", "form"),
    [
        (8, 1, DepthwiseExpand),
        (4, 1, DepthwiseExpand),
        (4, 2, DepthwiseExpand),
        (4, 4, ConcatExpand),
        (2, 4, DepthwiseExpand),
        (2, 8, ConcatExpand),
    ],
)
def test_form_follows_from_how_much_it_moves(kept: int, slots: int, form: type) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(random_layer(4, 8, kept=kept, slots=slots))
    portable = with_standard_operators(model)
    assert type(portable[0]) is form
    x = images()
    torch.testing.assert_close(portable(x), model(x))


class Between(nn.Module):
    """An SBF layer, something, and its reader."""

    def __init__(self, between: Callable, reader: nn.Module) -> None:
        super().__init__()
        self.layer = random_layer(4, 8, kept=4, slots=2)
        self.between = between
        self.reader = reader.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.between(self.layer(x)))


def order_is_free(model: nn.Module, name: str = "layer") -> bool:
    form = with_standard_operators(model.eval()).get_submodule(name)
    return isinstance(form, ConcatExpand) and form.order is None


@pytest.mark.parametrize(
    "between",
    [
        nn.Identity(),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.SiLU(), nn.MaxPool2d(2)),
        F.relu,
        lambda y: y.relu(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8).double(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False).double(),
    ],
)
@pytest.mark.parametrize(
    "reader",
    [
        lambda: nn.Conv2d(8, 5, 3, padding=1),
        lambda: random_layer(8, 6, kept=3, slots=1),
        lambda: random_layer(8, 6, kept=3, slots=4),
    ],
)
def test_order_is_taken_up_by_the_convolution_that_reads_it(
    between: Callable, reader: Callable
) -> None:
    torch.manual_seed(0)
    model = Between(between, reader()).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    portable = with_standard_operators(model)
    assert order_is_free(model)
    x = images()
    torch.testing.assert_close(portable(x), model(x))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("between", "reader"),
    [
        (nn.BatchNorm2d(8).double(), nn.Conv2d(8, 5, 3)),
        (nn.PReLU(8).double(), nn.Conv2d(8, 5, 3)),
        (nn.Identity(), nn.Conv2d(8, 6, 3, groups=2)),
        (nn.Conv2d(8, 16, 3, groups=8).double(), nn.Conv2d(16, 5, 1)),
        (nn.Identity(), nn.BatchNorm2d(8)),
        (lambda y: y + y.flip(1), nn.Conv2d(8, 5, 3)),
        (lambda y: y[:, :3], nn.Conv2d(3, 5, 3)),
        (lambda y: y.mean((2, 3)), nn.Linear(8, 5)),
        (nn.Flatten(2), nn.Identity()),
        (nn.Softmax(1), nn.Conv2d(8, 5, 3)),
    ],
)
def test_order_is_restored_before_anything_else(between: Callable, reader: nn.Module) -> None:
    torch.manual_seed(0)
    model = Between(between, reader).eval()
    assert not order_is_free(model)
    x = images()
    torch.testing.assert_close(with_standard_operators(model)(x), model(x))


def test_order_of_a_layer_that_is_an_output_too_is_restored() -> None:
    class AlsoOutput(Between):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.layer(x)
            return y, self.reader(y)

    torch.manual_seed(0)
    model = AlsoOutput(nn.Identity(), nn.Conv2d(8, 5, 3)).eval()
    assert not order_is_free(model)
    x = images()
    torch.testing.assert_close(with_standard_operators(model)(x), model(x))


def test_reader_that_is_called_twice_is_not_permuted() -> None:
    class Twice(Between):
        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return self.reader(y) + self.reader(y.flip(1))

    torch.manual_seed(0)
    model = Twice(nn.Identity(), nn.Conv2d(8, 5, 3)).eval()
    assert not order_is_free(model)
    x = images()
    torch.testing.assert_close(with_standard_operators(model)(x), model(x))


def test_network_that_cannot_be_traced_keeps_its_orders_and_a_warning_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class BranchOnData(Between):
        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return self.reader(y) if y.sum() > 0 else self.reader(-y)

    torch.manual_seed(0)
    model = BranchOnData(nn.Identity(), nn.Conv2d(8, 5, 3)).eval()
    with caplog.at_level(logging.WARNING):
        portable = with_standard_operators(model)
    assert "BranchOnData cannot be traced" in caplog.text
    x = images()
    torch.testing.assert_close(portable(x), model(x))


@pytest.mark.parametrize(
    ("name", "free"), [("torchvision:resnet50", 32), ("torchvision:mobilenet_v2", 18)]
)
@pytest.mark.parametrize("slots", [1, 4])
def test_networks_agree_and_leave_orders_free(name: str, free: int, slots: int) -> None:
    torch.manual_seed(0)
    model = models.build(name, 10)
    for layer, conv in list(model.named_modules()):
        if type(conv) is not nn.Conv2d or conv.in_channels == 3 or conv.groups > 1:
            continue
        kept = list(range(0, conv.out_channels, 2))
        sources = [
            [kept[i] for i in torch.randint(len(kept), (slots,)).tolist()]
            for _ in range(conv.out_channels - len(kept))
        ]
        sbf = SBFConv2d.from_conv(conv, kept, sources)
        nn.init.normal_(sbf.transforms, std=0.3)
        model.set_submodule(layer, sbf, strict=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    folded = fold_batchnorm(model.eval()).double()
    portable = with_standard_operators(folded)
    found = [m for m in portable.modules() if isinstance(m, ConcatExpand) and m.order is None]
    assert len(found) == (free if slots > 1 else 0)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(portable(x), folded(x), rtol=1e-8, atol=1e-8)
