"""Networks whose code takes another branch when torch.fx traces it."""

import copy
import io
import logging
from typing import Any

import pytest
import torch
from students import half_of_every_block, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.compression.remembered import remember
from sbf_dist.errors import UserError
from sbf_dist.export.fold import fold_batchnorm
from sbf_dist.export.onnx import export_onnx, verify_onnx
from sbf_dist.export.optimize import optimize
from sbf_dist.export.tracing import UntraceableError, traced


class TwoNorms(nn.Module):
    """A convolution and two batch norms, of which an argument or a type chooses one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.source = nn.BatchNorm2d(8)
        self.target = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def scores(self, x: Tensor, norm: nn.Module) -> Tensor:
        return self.head(norm(self.conv(x)).relu().mean((2, 3)))


class ByNone(TwoNorms):
    def forward(self, x: Tensor, domain: str | None = None) -> Tensor:
        return self.scores(x, self.source if domain is None else self.target)


class ByFlag(TwoNorms):
    def forward(self, x: Tensor, *, adapted: bool = False, size: tuple = (1, 1)) -> Tensor:
        y = self.scores(x, self.target if adapted else self.source)
        return y * size[0]


class WithLoss(TwoNorms):
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        y = self.scores(x, self.source)
        return y if targets is None else F.cross_entropy(y, targets)


class ByType(TwoNorms):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x, self.source if isinstance(x, Tensor) else self.target)


class TensorOrDict(TwoNorms):
    def forward(self, x: Any) -> Tensor:
        return self.scores(x if isinstance(x, Tensor) else x["image"], self.source)


class ByKeyword(TwoNorms):
    def forward(self, x: Tensor, **settings: Any) -> Tensor:
        domain = settings.get("domain")
        return self.scores(x, self.source if domain is None else self.target)


OPTIONAL = [ByNone, ByFlag, WithLoss]


def network(kind: type[nn.Module], *, planned: bool) -> nn.Module:
    torch.manual_seed(0)
    made = randomise(kind()).eval()
    return remember(made, half_of_every_block(sources=1)) if planned else made


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prepare", [optimize, fold_batchnorm])
@pytest.mark.parametrize(
    ("kind", "planned"),
    [(kind, planned) for kind in OPTIONAL for planned in (True, False)]
    + [(kind, True) for kind in (ByType, TensorOrDict, ByKeyword)],
)
@torch.no_grad()
def test_it_is_prepared_for_the_branch_that_it_takes(prepare, kind, planned):
    model = network(kind, planned=planned)
    torch.testing.assert_close(prepare(model)(images()), model(images()))


@pytest.mark.parametrize("kind", [*OPTIONAL, ByType])
def test_its_onnx_file_follows_the_branch_that_it_takes(kind, tmp_path):
    model = network(kind, planned=False)
    export_onnx(model, tmp_path / "model.onnx", input_shape=(3, 16, 16))
    assert verify_onnx(tmp_path / "model.onnx", model, images()) < 1e-5


@pytest.mark.parametrize("kind", OPTIONAL)
def test_optional_arguments_hinder_no_fusion(kind, caplog):
    model = optimize(network(kind, planned=True))
    assert isinstance(model, torch.fx.GraphModule)
    assert "cannot be traced" not in caplog.text


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, through_a_file])
@torch.no_grad()
def test_an_optional_argument_keeps_its_name_and_takes_its_default_alone(copied):
    model = network(ByNone, planned=True)
    optimized = copied(optimize(model))
    for found in (optimized(images(), None), optimized(images(), domain=None)):
        torch.testing.assert_close(found, model(images()))
    for other in ("target", torch.zeros(2)):
        with pytest.raises(UserError, match="argument domain is fixed to its default, None, in"):
            optimized(images(), domain=other)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
@torch.no_grad()
def test_an_optimized_network_with_an_optional_argument_is_recorded_by_torch():
    model = optimize(network(ByFlag, planned=True))
    wanted = model(images())
    program = torch.export.export(model, (images(),)).module()
    torch.testing.assert_close(program(images()), wanted)
    torch.testing.assert_close(torch.jit.trace(model, images())(images()), wanted)


class Masked(TwoNorms):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.scores(x if mask is None else x * mask, self.source)


def test_an_argument_that_a_student_is_called_with_is_an_input_though_it_has_a_default():
    model = network(Masked, planned=False)
    both = images(), torch.rand(4, 1, 16, 16)
    graph = traced(model, both)
    with torch.no_grad():
        found = torch.fx.GraphModule(model, graph)(*both)
        torch.testing.assert_close(found, model(*both))
        assert not torch.allclose(found, model(images()))


def test_a_graph_that_computes_something_else_is_refused(caplog):
    for kind in (ByType, TensorOrDict):
        with pytest.raises(UntraceableError, match="its code takes another branch"):
            traced(network(kind, planned=False), (images(),))
    with caplog.at_level(logging.WARNING):
        fold_batchnorm(network(ByType, planned=True))
    assert "ByType cannot be traced by torch.fx (its code takes another branch" in caplog.text


class Noisy(TwoNorms):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x + torch.randn_like(x), self.source)


class ConstantNoise(TwoNorms):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x, self.source) + torch.randn(5)  # which torch.fx draws once


class OfOtherSize(TwoNorms):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x.reshape(-1, 3, 20, 20), self.source)


@pytest.mark.parametrize("kind", [Noisy, OfOtherSize])
def test_neither_chance_nor_an_example_that_does_not_fit_makes_a_network_untraceable(kind):
    model = network(kind, planned=False)
    before = torch.get_rng_state()
    traced(model, (images(),))
    assert torch.equal(torch.get_rng_state(), before)


def test_random_numbers_that_would_become_constants_make_a_network_untraceable():
    with pytest.raises(UntraceableError, match="its code takes another branch"):
        traced(network(ConstantNoise, planned=False), (images(),))
