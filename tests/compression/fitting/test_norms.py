"""Statistics of batch norms are moved by what has changed, and by nothing else."""

import copy

import torch
from small_networks import pictures, small
from torch import nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.norms import (
    movable,
    move_batch_norms,
)
from sbf_dist.compression.fitting.reference import Reference

IMAGES = Calibration.of(pictures(24), batch=8)


def foreign(model):
    """The same network, with statistics that its images do not have."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 0.3
            module.running_var *= 3
    return model


def test_a_network_that_is_as_it_was_keeps_its_statistics():
    model = foreign(small())
    student = copy.deepcopy(model)
    move_batch_norms(student, Reference(model), IMAGES)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(student.state_dict()[key], value, rtol=1e-6, atol=1e-6)


def test_a_shift_and_a_scale_before_a_batch_norm_are_made_up_for():
    model = small()
    student = copy.deepcopy(model)
    scale = 0.5 + torch.rand(16)
    with torch.no_grad():
        student.conv1.weight *= scale[:, None, None, None]
    move_batch_norms(student, Reference(model), IMAGES)
    x = pictures(8)
    with torch.no_grad():
        torch.testing.assert_close(student(x), model(x), rtol=0.1, atol=0.1)


def test_only_channels_that_are_left_are_compared():
    model = small()
    left = [0, 3, 4, 9, 15]
    student = copy.deepcopy(model)
    student.conv1 = nn.Conv2d(8, 5, 3, padding=1, bias=False)
    student.norm1 = nn.BatchNorm2d(5)
    student.conv2 = nn.Conv2d(5, 16, 3, stride=2, padding=1, bias=False)
    with torch.no_grad():
        student.conv1.weight.copy_(model.conv1.weight[left])
        for key, value in model.norm1.state_dict().items():
            student.norm1.state_dict()[key].copy_(value[left] if value.ndim else value)
        student.conv2.weight.copy_(model.conv2.weight[:, left])
    student.eval()
    move_batch_norms(student, Reference(model, {"norm1": left}), IMAGES)
    torch.testing.assert_close(student.norm1.running_mean, model.norm1.running_mean[left])
    assert not torch.equal(student.norm2.running_mean, model.norm2.running_mean)


def test_what_has_been_moved_already_does_not_count_twice():
    model = small()
    student = copy.deepcopy(model)
    with torch.no_grad():
        student.conv1.weight *= 1.2
        student.conv2.weight += 0.05
    move_batch_norms(student, Reference(model), IMAGES)
    once = copy.deepcopy(student.state_dict())
    move_batch_norms(student, Reference(model), IMAGES)
    for key, value in once.items():
        torch.testing.assert_close(student.state_dict()[key], value, atol=1e-5, rtol=1e-4)


def test_of_many_images_the_first_are_compared(monkeypatch):
    for name, value in {"calibration.PIXELS": 4 * 100, "fitting.norms.MOST_IMAGES": 14}.items():
        monkeypatch.setattr(f"sbf_dist.compression.{name}", value)
    many = pictures(40)
    model = small()
    student, few = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for network in (student, few):
            network.conv1.weight *= 1.2
    seen = []
    for network in (model, student):
        network.stem.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    move_batch_norms(student, Reference(model), Calibration.of(many))
    assert torch.equal(torch.cat(seen[::2]), many[:16])
    assert torch.equal(torch.cat(seen[1::2]), many[:16])
    monkeypatch.setattr("sbf_dist.compression.fitting.norms.MOST_IMAGES", 16)
    move_batch_norms(few, Reference(model), Calibration.of(many[:16]))
    for key, value in few.state_dict().items():
        torch.testing.assert_close(student.state_dict()[key], value)


def test_a_batch_norm_that_two_layers_use_stays():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.two(self.norm(self.one(x)))).mean((2, 3))

    assert movable(Shared().eval(), pictures(2)) == {}
    assert set(movable(small(), pictures(2))) == {"conv1", "conv2"}
