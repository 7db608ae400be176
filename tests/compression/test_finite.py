"""Networks and images that give no numbers are refused in one line that says where they begin."""

import pytest
import torch
from small_networks import Small, pictures, small
from torch import Tensor, nn

import sbf_dist
from sbf_dist.errors import UserError
from sbf_dist.settings import Compression


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    ).eval()


def images() -> Tensor:
    return torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = network()
    model[1].running_mean[3] = torch.inf
    with pytest.raises(UserError, match=r"has infinity in layer 1 \(running_mean\): its weights"):
        sbf_dist.compress(model, images(), macs=0.5)
    own = Masked()
    own.scale.data.fill_(torch.nan)
    with pytest.raises(UserError, match=r"model 'Masked' has NaN in scale: its weights"):
        sbf_dist.compress(own.eval(), images(), macs=0.5)


class Masked(nn.Module):
    """A mask of minus infinity, as those of attention, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("mask", torch.full((16, 16), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.scale * x @ self.mask.softmax(-1))


@pytest.mark.parametrize("removal", [0.0, 1.0])
def test_a_mask_may_have_infinities(removal: float) -> None:
    settings = sbf_dist.Compression(macs=0.8, removal=removal)
    student, _ = sbf_dist.compress(Masked().eval(), images(), settings)
    assert student(images()).isfinite().all()
    assert student.mask.isinf().any()


@pytest.mark.parametrize("removal", [0.0, 1.0])
def test_a_network_that_gives_nan_is_refused_with_the_layer(removal: float) -> None:
    model = network()
    model[1].running_var.fill_(-1.0)
    with pytest.raises(UserError) as caught:
        sbf_dist.compress(model, images(), sbf_dist.Compression(macs=0.5, removal=removal))
    assert str(caught.value) == (
        "model Sequential gives NaN for the calibration images; first in layer 1 (BatchNorm2d): "
        "look at its weights and statistics"
    )


def test_an_infinite_output_is_refused_too() -> None:
    model = network()
    model[6].weight.data.zero_()
    model[6].bias.data.fill_(-3e38)
    model.append(nn.LeakyReLU(100.0))
    with pytest.raises(UserError, match=r"gives infinity .* first in layer 7 \(LeakyReLU\)"):
        sbf_dist.compress(model, images(), macs=0.5)


def test_an_image_that_is_no_number_is_refused_wherever_it_comes() -> None:
    given = images()
    given[20, 0, 3, 4] = torch.nan
    with pytest.raises(UserError, match="calibration images"):
        sbf_dist.compress(network(), given, macs=0.5)


SETTINGS = [
    Compression(macs=0.7),
    Compression(macs=0.7, criterion="taylor"),
    Compression(macs=0.7, removal=1.0),
    Compression(macs=0.7, removal=1.0, criterion="taylor"),
]


@pytest.mark.filterwarnings("ignore:calibration images")
@pytest.mark.parametrize("settings", SETTINGS)
def test_features_whose_squares_are_too_large_are_refused_with_the_layer(
    settings: Compression,
) -> None:
    with pytest.raises(UserError, match=r"^layer \w+: its features .* are (NaN|infinity): give"):
        sbf_dist.compress(small(), 1e20 * pictures(24), settings)


class RootOfZero(Small):
    """Adds to its features what is always 0, by a root that has no derivative there."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(self.stem(x).relu()))
        x = self.norm2(self.conv2(x.relu()))
        return self.head(x.mean((2, 3)) + (x - x).square().sum((2, 3)).sqrt())


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_that_are_no_numbers_are_refused_with_the_layer(settings: Compression) -> None:
    network = RootOfZero()
    network.load_state_dict(small().state_dict())
    with pytest.raises(UserError, match=r"^layer \w+: the gradients .* are NaN for"):
        sbf_dist.compress(network.eval(), pictures(24), settings)
