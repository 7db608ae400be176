"""No number and no size of images may leave one alone: batch norm cannot take a single value."""

import pytest
import torch
from small_networks import pictures
from torch import nn

from sbf_dist.compression.joint import JointPlanner
from sbf_dist.compression.one_shot import compress
from sbf_dist.compression.removal.probe import Probe
from sbf_dist.settings import Compression


class BehindPooling(nn.Module):
    """Batch norm of vectors, and one of 1 x 1 maps."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Sigmoid()
        )
        self.vector = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.norm(self.conv(self.stem(x).relu())).relu()
        x = x * self.squeeze(x)
        x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.head(self.vector(x))


def behind_pooling():
    torch.manual_seed(0)
    return BehindPooling().eval()


NAME = "behind"


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(pictures(65), id="65 at once"),
        pytest.param(pictures(17).split(16), id="17, 16 at a time"),
        pytest.param(pictures(3), id="3"),
        pytest.param(pictures(9).split(1), id="one at a time"),
    ],
)
def test_networks_with_batch_norm_behind_pooling_are_compressed(images):
    student, plan = compress(behind_pooling(), images, macs=0.7, name=NAME)
    assert plan.macs_after <= 0.7 * plan.macs_before
    assert student(pictures(2)).isfinite().all()


def test_images_so_large_that_one_is_a_part_come_in_pairs(monkeypatch):
    monkeypatch.setattr("sbf_dist.compression.calibration.PIXELS", 10)
    student, _ = compress(behind_pooling(), pictures(5), macs=0.7, name=NAME)
    assert student(pictures(2)).isfinite().all()


def test_channels_are_removed_where_a_batch_would_have_one_image():
    planner = JointPlanner(
        behind_pooling(),
        pictures(65),
        Compression(macs=0.7, removal=0.5),
        probe=Probe(steps=3, batch=16),
        name=NAME,
    )
    _, plan = planner.best([0.5])
    assert plan.removed
