import logging

import pytest
import torch
from students import randomise
from torch import Tensor, nn

from sbf_dist import models
from sbf_dist.export.fold import (
    MAX_GAIN,
    UnscaledSBFConv2d,
    fold_batchnorm,
    fold_into_sbf,
)
from sbf_dist.layers import SBFConv2d


def sbf_pair(
    *, slots: int, m: int = 3, groups: int = 1, bias: bool = True, stride: int = 1
) -> nn.Sequential:
    """An SBF layer of 12 channels, 6 kept, and a batch norm, in double precision."""
    torch.manual_seed(slots)
    kept = [0, 2, 5, 6, 9, 11]
    sources = [[kept[(2 * i + s) % 6] for s in range(slots)] for i in range(6)]
    layer = SBFConv2d(
        4, 12, 3, kept, sources, m, stride=stride, padding=1, groups=groups, bias=bias
    )
    if bias:
        nn.init.normal_(layer.bias)
    return randomise(nn.Sequential(layer, nn.BatchNorm2d(12))).double().eval()


def images(channels: int = 4) -> Tensor:
    return torch.randn(3, channels, 9, 7, dtype=torch.float64)


def check_equal(folded: nn.Module, model: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(folded(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_norm_after_convolution_folds_exactly(bias: bool, affine: bool) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=bias)
    model = randomise(nn.Sequential(conv, nn.BatchNorm2d(6, affine=affine))).double().eval()
    folded = fold_batchnorm(model)
    assert isinstance(folded[1], nn.Identity)
    check_equal(folded, model, images())


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("m", [1, 3, 5])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_norm_after_sbf_layer_folds_exactly_borders_included(
    slots: int, m: int, groups: int, bias: bool
) -> None:
    model = sbf_pair(slots=slots, m=m, groups=groups, bias=bias, stride=2)
    with torch.no_grad():
        model[1].weight[2::3].neg_()
    folded = fold_batchnorm(model)
    assert type(folded[0]) is SBFConv2d
    assert isinstance(folded[1], nn.Identity)
    check_equal(folded, model, images())


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tiny", [0.0, 1e-30, -1e-6])
def test_source_with_tiny_scale_folds_exactly_and_magnifies_nothing(
    slots: int, groups: int, tiny: float
) -> None:
    model = sbf_pair(slots=slots, groups=groups)
    with torch.no_grad():
        model[1].weight[[2, 9]] = tiny
    folded = fold_batchnorm(model)
    assert isinstance(folded[0], UnscaledSBFConv2d)
    check_equal(folded, model, images())
    scale = (model[1].weight / (model[1].running_var + model[1].eps).sqrt()).abs().max()
    largest = MAX_GAIN * scale * model[0].transforms.abs().max()
    assert folded[0].transforms.abs().max() <= largest
    assert folded[0].basis.weight.shape == model[0].basis.weight.shape


def test_zero_scale_that_only_silent_channels_read_needs_no_hidden_feature() -> None:
    # a residual block's last norm starts with all its weights at zero
    model = sbf_pair(slots=4)
    nn.init.zeros_(model[1].weight)
    folded = fold_batchnorm(model)
    assert type(folded[0]) is SBFConv2d
    check_equal(folded, model, images())


def test_folded_layer_keeps_float32() -> None:
    model = sbf_pair(slots=1).float()
    with torch.no_grad():
        model[1].weight[2] = 0
    folded = fold_into_sbf(model[0], model[1])
    assert {p.dtype for p in folded.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in folded.parameters())
    x = images().float()
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_whole_student_folds_and_itself_stays_unchanged(student: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    x = torch.randn(4, 3, 16, 16)
    expected = student(x)
    folded = fold_batchnorm(student.train())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)
    assert student.training
    assert all(torch.equal(before[n], t) for n, t in student.state_dict().items())


def test_norms_with_activation_of_timm_fold_and_keep_it() -> None:
    torch.manual_seed(0)
    model = randomise(models.build("timm:mobilenetv3_small_050", 5)).eval()
    folded = fold_batchnorm(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-3, atol=1e-3)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)


class SharedConvolution(TwoReaders):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(x)


class BranchOnData(TwoReaders):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (TwoReaders, "2 readers"),
        (SharedConvolution, "called 2 times"),
        (BranchOnData, "BranchOnData cannot be traced"),
    ],
)
def test_norm_that_cannot_be_folded_stays_and_a_warning_says_why(
    kind: type[nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = randomise(kind()).double().eval()
    with caplog.at_level(logging.WARNING):
        folded = fold_batchnorm(model)
    assert reason in caplog.text
    assert isinstance(folded.norm, nn.BatchNorm2d)
    check_equal(folded, model, images())


def test_norm_before_a_convolution_stays_and_a_warning_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = randomise(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3)))
    folded = fold_batchnorm(model.double())
    assert "not folded, it does not follow a convolution: batch norm 0" in caplog.text
    check_equal(folded, model.eval(), images())
