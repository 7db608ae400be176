import copy

import torch
from compared_networks import images, network
from torch import nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.peers.batch_norms import settle_batch_norms


def means(model):
    return [m.running_mean.clone() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_measured_statistics_are_the_images_own():
    dense = network("resnet").eval()
    small = copy.deepcopy(dense)
    with torch.no_grad():
        for module in small.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean += 1
    settle_batch_norms(small, Reference(dense), Calibration.of(images()), "measured")
    before = means(dense)
    assert not small.training
    assert all((a - b).abs().max() < 0.9 for a, b in zip(means(small), before, strict=True))


def test_moved_statistics_stay_where_nothing_has_changed():
    dense = network("resnet").eval()
    small = copy.deepcopy(dense)
    settle_batch_norms(small, Reference(dense), Calibration.of(images() + 3), "moved")
    for a, b in zip(means(small), means(dense), strict=True):
        torch.testing.assert_close(a, b)
