"""A trained classifier, and images that are not normalised as it was trained."""

import warnings

import pytest
import torch
from small_networks import Small
from torch.nn import functional as F

from sbf_dist.compression.likeness import UnlikeImages
from sbf_dist.compression.one_shot import compress

STEPS = 60


def labelled(count, seed):
    """Five patterns under noise."""
    patterns = torch.randn(5, 3, 10, 10, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (count,), generator=generator)
    noise = torch.randn(count, 3, 10, 10, generator=generator)
    return patterns[labels] + 0.8 * noise, labels


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    network = Small()
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for step in range(STEPS):
        images, labels = labelled(64, step)
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.eval()


def right(network, scale):
    images, labels = labelled(256, 2000)
    with torch.no_grad():
        return float((network(scale * images).argmax(1) == labels).float().mean())


def compressed(network, scale):
    """Return the student at half, and the lines that were warned of."""
    images, _ = labelled(256, 1000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        student, plan = compress(network, scale * images, macs=0.5, name="small")
    assert plan.macs_after <= 0.5 * plan.macs_before
    return student, [str(one.message) for one in caught if one.category is UnlikeImages]


def test_with_images_as_it_was_trained_on_a_classifier_keeps_its_accuracy_at_half(classifier):
    student, told = compressed(classifier, 1.0)
    assert right(classifier, 1.0) > 0.98
    assert right(student, 1.0) > right(classifier, 1.0) - 0.02
    assert told == []


@pytest.mark.parametrize("scale", [0.2, 5.0])
def test_with_images_on_another_scale_it_is_told_and_fits_what_it_was_given(classifier, scale):
    student, (told,) = compressed(classifier, scale)
    assert f"multiplied by {1 / scale:g} they are near" in told
    # On such images it does what the dense network does; on others nobody promised anything.
    assert right(student, scale) > right(classifier, scale) - 0.05
