"""Images that are not what a network knows are told of, with the likely cause."""

import re
import warnings

import pytest
import torch
from small_networks import Merging, Small, pictures, small
from torch import nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.statistics import measure_batch_norm
from sbf_dist.compression.likeness import UnlikeImages, what_is_unlike
from sbf_dist.compression.one_shot import compress

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def scenes(count=64, seed=0):
    """Images in 0 … 1 with a blue upper and a brown lower half, roughly as photographs have."""
    generator = torch.Generator().manual_seed(seed)
    light = torch.rand(count, 1, 1, 1, generator=generator)
    noise = torch.rand(count, 3, 12, 12, generator=generator)
    noise = nn.functional.avg_pool2d(noise, 3, 1, 1)
    colours = torch.empty(3, 12, 1)
    colours[:, :6] = torch.tensor([0.2, 0.4, 0.8])[:, None, None]
    colours[:, 6:] = torch.tensor([0.6, 0.4, 0.2])[:, None, None]
    images = 0.4 * colours + 0.3 * light + 0.3 * noise
    images[0, :, 0, 0], images[1, :, 0, 0] = 0.0, 1.0
    return images


def normalised(images):
    return (images - MEAN) / STD


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d: statistics that are buffers, and no batch norm."""

    def __init__(self, norm):
        super().__init__()
        self.eps = norm.eps
        for key in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(key, getattr(norm, key).detach())

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = Small().eval()
    nn.init.normal_(model.head.weight)
    measure_batch_norm(model, normalised(scenes(256, seed=1)), 256)
    return model


def told(model, images):
    return what_is_unlike(model, Calibration.of(images))


def test_other_images_of_the_same_kind_are_not_worth_a_word(network):
    for seed in range(2, 6):
        assert told(network, normalised(scenes(16, seed))) is None


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda x: x, "normalised by ImageNet's mean and std instead of 0 … 1 they are near"),
        (lambda x: 255 * x, "ImageNet's mean and std instead of 0 … 255 they are near"),
        (lambda x: 0.2 * normalised(x), "multiplied by 5 they are near"),
        (lambda x: 255 * (x - MEAN), "instead of ImageNet's mean, 0 … 255 they are near"),
        (lambda x: normalised(x).flip(1), "red and blue may be swapped"),
        (lambda x: 2 * torch.randn(x.shape, generator=torch.Generator()), "are they noise?"),
        (
            lambda x: 0.05 * x + 6 * (-1.0) ** torch.arange(3)[:, None, None],
            "are they images of another kind?",
        ),
        (torch.zeros_like, "they are all the same image"),
        (lambda x: x[:1].expand(9, -1, -1, -1), "they are all the same image"),
        (lambda x: x.mean((2, 3), keepdim=True).expand_as(x), "each of them has one colour only"),
    ],
)
def test_a_likely_cause_is_named_in_one_line(network, change, cause):
    found = told(network, change(scenes(32)))
    assert found.startswith("calibration images: ")
    assert cause in found
    assert "\n" not in found


def test_images_of_one_channel_can_be_on_another_scale():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(800, 3))
    images = scenes()[:, :1]
    measure_batch_norm(model, images, 64)
    assert told(model, images) is None
    assert "multiplied by 0.004" in told(model, 255 * images)


@pytest.mark.parametrize(("scale", "name"), [(1, "0 … 1"), (255, "0 … 255")])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_that_are_not_normalised_are_told_of_whatever_the_mean_and_std(
    channels, scale, name
):
    torch.manual_seed(0)
    model = Small().eval()
    model.stem = nn.Conv2d(channels, 8, 3, padding=1)
    known = (scenes(256, seed=1)[:, :channels] - 0.4) / 0.15
    measure_batch_norm(model, known, 256)
    found = told(model, scale * scenes()[:, :channels])
    # Means and stds are tried in steps, and what is near to one is near to its neighbours.
    guess = rf"normalised by mean 0\.[345], std 0\.(15|2) or so instead of {name} they are near"
    assert re.search(guess, found)


def test_images_of_no_known_range_may_have_another_mean_and_std():
    found = told(small(), 60 * pictures(32) + 120)
    assert "normalised to mean 0 and std 1 instead of mean 121 and std 69 they are near" in found


def test_a_network_that_has_not_seen_images_says_nothing():
    assert told(Small().eval(), 255 * scenes()) is None
    assert told(small(norm=False), 255 * scenes()) is None


@pytest.mark.filterwarnings("ignore::sbf_dist.compression.likeness.UnlikeImages")
def test_a_network_whose_weights_change_with_its_mode_stays_as_it_was():
    model = small()
    model.conv1 = Merging(8, 16, 3, padding=1, bias=False)
    model.train()
    weight = model.conv1.weight.clone()
    compress(model, pictures(64), macs=0.6, name="small")
    assert model.conv1.training
    assert not model.conv1.merged
    assert torch.equal(model.conv1.weight, weight)


def test_the_network_stays_as_it_was(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    try:
        assert told(network, 255 * scenes()) is not None
        assert all(module.training for module in network.modules())
    finally:
        network.eval()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_frozen_batch_norms_remember_too(network):
    frozen = Small().eval()
    frozen.load_state_dict(network.state_dict())
    for name in ("norm1", "norm2"):
        setattr(frozen, name, Frozen(getattr(network, name)))
    assert told(frozen, normalised(scenes())) is None
    assert "0 … 255" in told(frozen, 255 * scenes())


def test_compressing_goes_on_after_one_warning(network):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        student, _ = compress(network, 0.2 * normalised(scenes()), macs=0.5, name="small")
    assert student is not None
    (warning,) = [one for one in caught if issubclass(one.category, UnlikeImages)]
    assert issubclass(warning.category, UserWarning)
    line = warnings.formatwarning(
        warning.message, warning.category, warning.filename, warning.lineno
    )
    assert line.count("\n") == 1
    assert "multiplied by 5" in line


def test_images_that_are_known_give_no_warning(network):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(network, normalised(scenes()), macs=0.5, name="small")
