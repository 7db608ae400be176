import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sbf_dist.compression.fitting.statistics import (
    gather_moments,
    measure_batch_norm,
    neighbourhoods,
    output_sensitivity,
    run_until,
)
from sbf_dist.compression.outputs import TEMPERATURE


def by_slicing(features, size):
    """(C · size², N · H · W) by slicing a padded array, tap by tap."""
    _, channels, h, w = features.shape
    border = size // 2
    padded = np.pad(features, ((0, 0), (0, 0), (border, border), (border, border)))
    rows = [
        padded[:, c, a : a + h, b : b + w].ravel()
        for c in range(channels)
        for a in range(size)
        for b in range(size)
    ]
    return np.stack(rows)


def test_every_neighbourhood_is_laid_out_as_a_row():
    features = torch.randn(2, 3, 4, 5)
    for size in (1, 3, 5):
        expected = by_slicing(features.numpy(), size)
        np.testing.assert_array_equal(neighbourhoods(features, size).T.numpy(), expected)


@pytest.mark.parametrize("images", [1, 2])
def test_neighbourhoods_never_shares_memory_with_the_features(images):
    features = torch.ones(images, 2, 3, 3)
    neighbourhoods(features, 1).zero_()
    assert features.sum() == features.numel()


@settings(max_examples=25, deadline=None)
@given(
    size=st.sampled_from([1, 3]),
    channels=st.integers(1, 3),
    shape=st.tuples(st.integers(3, 6), st.integers(3, 6)),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    offset=st.sampled_from([0.0, -3.0, 300.0]),
)
def test_moments_are_the_covariances_however_the_images_are_split(
    size, channels, shape, cuts, offset
):
    generator = torch.Generator().manual_seed(sum(cuts) + channels)
    images = sum(cuts)
    z = torch.randn(images, channels, *shape, generator=generator) + offset
    y = 0.5 * z + torch.randn(images, channels, *shape, generator=generator)
    moments = gather_moments(zip(z.split(cuts), y.split(cuts), strict=True), size)

    columns = by_slicing(z.double().numpy(), size)
    targets = y.double().transpose(0, 1).flatten(1).numpy()
    joint = np.cov(np.concatenate([columns, targets]), bias=True)
    taps = len(columns)
    difference = targets - columns[size**2 // 2 :: size**2]
    scale = {"rtol": 1e-4, "atol": 1e-5 * max(1.0, joint[:taps, :taps].max())}
    np.testing.assert_allclose(moments.zz, joint[:taps, :taps], **scale)
    np.testing.assert_allclose(moments.zy, joint[:taps, taps:], **scale)
    np.testing.assert_allclose(moments.yy, joint[taps:, taps:].diagonal(), rtol=1e-3)
    np.testing.assert_allclose(moments.z_mean, columns.mean(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.y_mean, targets.mean(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.drift, difference.var(1), rtol=1e-3)


def test_a_small_variance_beside_a_large_mean_is_not_lost():
    z = 1000 + 0.01 * torch.randn(8, 2, 9, 9)
    moments = gather_moments(iter([(z[:4], z[:4]), (z[4:], z[4:])]), 1)
    expected = np.cov(z.double().transpose(0, 1).flatten(1).numpy(), bias=True)
    np.testing.assert_allclose(moments.zz, expected, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(moments.yy, expected.diagonal(), rtol=1e-3)


def test_drift_of_equal_candidates_and_targets_is_nothing_and_ignores_their_means():
    z = torch.randn(4, 3, 5, 5)
    bias = torch.tensor([0.0, 5.0, -2.0])[:, None, None]
    noisy = z + bias
    noisy[:, 2] += 0.5 * torch.randn(4, 5, 5)
    drift = gather_moments(iter([(z, noisy)]), 3).drift
    assert drift[0] == 0
    assert drift[1] < 1e-12
    assert drift[2] == pytest.approx((noisy - z)[:, 2].var(correction=0).item(), rel=1e-5)


def test_restrict_keeps_the_given_candidates_and_all_targets():
    z, y = torch.randn(4, 5, 6, 6), torch.randn(4, 5, 6, 6)
    whole = gather_moments(iter([(z, y)]), 3)
    part = whole.restrict([1, 4])
    alone = gather_moments(iter([(z[:, [1, 4]], y[:, [1, 4]])]), 3)
    torch.testing.assert_close(part.zz, alone.zz)
    torch.testing.assert_close(part.z_mean, alone.z_mean)
    torch.testing.assert_close(part.zy[:, [1, 4]], alone.zy)
    assert part.zy.shape == (18, 5)
    assert torch.equal(part.yy, whole.yy)


class Explodes(nn.Module):
    def forward(self, x):
        raise AssertionError("a layer behind the one that was looked for has run")


def test_run_until_returns_input_or_output_and_runs_nothing_behind_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), Explodes())
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(run_until(model, "2", x, output=False), model[1](model[0](x)))
    torch.testing.assert_close(run_until(model, "2", x, output=True), model[:3](x))


def test_no_hook_is_left_behind():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    run_until(model, "0", torch.randn(1, 3, 6, 6), output=True)
    output_sensitivity(model, ["0"], lambda: iter([torch.randn(2, 3, 6, 6)]), seed=0)
    with pytest.raises(RuntimeError):
        run_until(model, "2", torch.randn(1, 3, 9, 9), output=True)
    with pytest.raises(RuntimeError):
        output_sensitivity(model, ["0"], lambda: iter([torch.randn(2, 3, 9, 9)]), seed=0)
    assert not any(module._forward_hooks for module in model.modules())


def test_sensitivity_of_logits_is_the_variance_of_their_label():
    # With the mean over H·W positions for logit c, E[(dloss/dy)²] summed over the positions is
    # p_c (1 - p_c) / (H · W).
    conv = nn.Conv2d(3, 4, 1)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    image = torch.randn(1, 3, 2, 3)
    images = image.expand(5000, -1, -1, -1)
    found = output_sensitivity(model, ["0"], lambda: iter(images.split(1250)), seed=1)["0"]
    probability = (model(image)[0] / TEMPERATURE).softmax(0).detach()
    expected = probability * (1 - probability) / 6
    torch.testing.assert_close(found, expected.double(), rtol=0.1, atol=1e-4)


def test_sensitivity_depends_on_the_seed_alone_and_leaves_no_gradients():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    images = torch.randn(6, 3, 6, 6)

    def measure(seed):
        torch.rand(1)  # the global generator must not matter
        return output_sensitivity(model, ["0"], lambda: iter(images.clone().split(3)), seed)["0"]

    assert torch.equal(measure(3), measure(3))
    assert not torch.equal(measure(3), measure(4))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_activation_that_overwrites_its_input_changes_nothing():
    conv, head = nn.Conv2d(3, 4, 3), nn.Linear(64, 5)
    images = torch.randn(6, 3, 6, 6)
    found = []
    for inplace in (False, True):
        model = nn.Sequential(conv, nn.ReLU(inplace), nn.Flatten(), head)
        found.append(output_sensitivity(model, ["0"], lambda: iter([images]), seed=0)["0"])
    assert torch.equal(*found)


def test_a_channel_that_nothing_reads_has_no_sensitivity():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 4, 4), nn.Flatten())
    with torch.no_grad():
        model[1].weight[:, 0] = 0
    found = output_sensitivity(model, ["0"], lambda: iter([torch.randn(8, 3, 6, 6)]), seed=0)["0"]
    assert found[0] == 0
    assert found[1] > 0


def test_batch_norm_is_measured_on_all_images_alike():
    # 65 images in batches of 64: the last one alone must not weigh as much as the others together.
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=0.3)).train()
    images = 5 + torch.randn(65, 2, 4, 4)
    images[-1] += 100
    measure_batch_norm(model, images, 64)
    torch.testing.assert_close(model[0].running_mean, images.mean((0, 2, 3)), rtol=0.02, atol=0)
    assert model[0].momentum == 0.3
    assert not model.training
    assert not model[0].training


def test_batch_norm_is_measured_without_dropout():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(2)).train()
    images = torch.randn(8, 2, 5, 5)
    measure_batch_norm(model, images, 8)
    torch.testing.assert_close(model[1].running_var, images.transpose(0, 1).flatten(1).var(1))
    assert not model[0].training


def test_large_feature_maps_are_sampled_and_their_covariance_is_kept():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    y = torch.einsum("cd,ndhw->nchw", mixing, torch.randn(8, 2, 60, 60, generator=generator))

    moments = gather_moments(((part, part) for part in y.split(4)), 1)

    expected = torch.cov(y.transpose(0, 1).flatten(1).double())
    torch.testing.assert_close(moments.zz, expected, atol=0.06, rtol=0)
    assert not torch.equal(moments.zz, expected), "all positions were used"


class ChannelsLast(nn.Module):
    """A linear layer that gives (N, H, W, C), as those of ConvNeXt do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 7)

    def forward(self, x):
        return self.linear(x.permute(0, 2, 3, 1)).mean((1, 2))


def test_the_channels_of_a_linear_layer_are_its_last_axis_however_many_there_are():
    linear, conv = ChannelsLast(), nn.Sequential(nn.Conv2d(3, 7, 1), nn.AdaptiveAvgPool2d(1))
    conv.append(nn.Flatten())
    conv[0].load_state_dict(
        {"weight": linear.linear.weight[..., None, None], "bias": linear.linear.bias}
    )
    images = torch.randn(8, 3, 5, 6)
    one, other = (
        output_sensitivity(model, [name], lambda: iter([images]), seed=0)[name]
        for model, name in ((linear, "linear"), (conv, "0"))
    )
    assert one.shape == (7,)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)
