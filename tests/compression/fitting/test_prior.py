import copy

import torch
from small_networks import pictures, small
from torch import nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.prior import SHARE, prior_variances, with_prior
from sbf_dist.compression.fitting.refit import solve
from sbf_dist.compression.fitting.statistics import Moments


def silent_on(images, channel):
    """A network whose conv1 has a channel that these images leave silent, and training did not."""
    model = small()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
        model.train()
        model(images)
        model.eval()
        # The training images drove it; these do not: its mean is far below zero.
        norm = model.norm1
        norm.running_mean[channel] += 6 * norm.running_var[channel].sqrt()
    return model


def test_a_channel_that_the_images_leave_silent_varies_as_it_did_in_training():
    images = Calibration.of(pictures(64))
    model = silent_on(pictures(64), 3)
    seen = []
    handle = model.conv2.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))
    model(pictures(64))
    handle.remove()
    shown = seen[0].transpose(0, 1).flatten(1).var(1)
    assert shown[3] < 1e-6
    prior = prior_variances(model, ["conv2"], images)["conv2"]
    assert prior[3] > 0.2 * prior.mean()
    torch.testing.assert_close(prior.sum(), shown.double().sum(), rtol=1e-2, atol=0)


def test_the_network_and_its_statistics_stay_as_they_are():
    model = silent_on(pictures(64), 3)
    before = copy.deepcopy(model.state_dict())
    prior_variances(model, ["conv2"], Calibration.of(pictures(8)))
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_without_batch_norms_or_with_one_image_nothing_is_known():
    assert prior_variances(small(norm=False), ["conv2"], Calibration.of(pictures(8))) == {}
    assert prior_variances(small(), ["conv2"], Calibration.of(pictures(1))) == {}


def moments(rows, size=1):
    width = rows.shape[1]
    covariance = rows.T @ rows / len(rows)
    eye = torch.eye(width // size**2).double()
    return Moments(
        zz=covariance.clone(),
        zy=covariance[:, size**2 // 2 :: size**2].clone(),
        yy=covariance.diagonal()[size**2 // 2 :: size**2].clone(),
        z_mean=torch.zeros(width).double(),
        y_mean=torch.zeros(len(eye)).double(),
        drift=torch.zeros(len(eye)).double(),
        size=size,
    )


def test_weights_of_silent_channels_stay_where_they_were():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=generator).double()
    x[:, 2] *= 1e-3
    found = moments(x)
    old = torch.randn(4, 4, 1, 1, generator=generator).double()
    # Targets that would be met best by a silent channel's noise.
    found.zy[:] = x.T @ torch.randn(400, 4, generator=generator).double() / 400
    free, _ = solve(found, old, ridge=1e-3)
    held, _ = solve(found, old, ridge=1e-3, prior=torch.ones(4).double())
    assert (free - old)[:, 2].abs().max() > 10 * (held - old)[:, 2].abs().max()


def test_moments_gain_what_the_filters_give_on_inputs_of_that_variance():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, 3, 3, generator=generator).double()
    prior = torch.rand(5, generator=generator).double()
    plain = moments(torch.randn(50, 27, generator=generator).double(), size=3)
    zz, zy, yy = plain.zz.clone(), plain.zy.clone(), plain.yy.clone()
    found = with_prior(plain, weight, prior)
    drawn = torch.randn(20000, 5, 3, 3, generator=generator).double()
    outputs = torch.einsum("noij,coij->nc", drawn * prior.sqrt()[:, None, None], weight)
    wanted = SHARE * outputs.T @ outputs / len(outputs)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(
        (found.yy - yy) / scale, wanted.diagonal() / scale, atol=0.05, rtol=0
    )
    for tap in range(9):
        torch.testing.assert_close(
            (found.zz - zz)[tap::9, tap::9] / scale, wanted / scale, atol=0.05, rtol=0
        )
    torch.testing.assert_close((found.zy - zy)[4::9] / scale, wanted / scale, atol=0.05, rtol=0)
    assert torch.equal(found.zz[0, 1::9], zz[0, 1::9])


def test_channels_of_a_group_vary_with_the_inputs_of_their_own():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 2, 3, 3, generator=generator).double()
    prior = torch.rand(4, generator=generator).double()
    whole = torch.zeros(6, 4, 3, 3).double()
    whole[:3, :2], whole[3:, 2:] = weight[:3], weight[3:]
    rows = torch.randn(50, 6, generator=generator).double()
    grouped, plain = (with_prior(moments(rows), w, prior) for w in (weight, whole))
    torch.testing.assert_close(grouped.zz, plain.zz)
    torch.testing.assert_close(grouped.zy, plain.zy)
