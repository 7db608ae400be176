import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sbf_dist.distill.mixup import mixup
from sbf_dist.distill.task import DistillationTask, stored_targets


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 8, 6, generator=generator)
    return {
        "image": images.to(memory_format=torch.channels_last),
        "label": torch.tensor([2, 0, -1, -1]),
        "id": torch.arange(4),
        "mixup_partner": torch.tensor([1, 0, 3, 2]),
        "mixup_share": torch.tensor([0.25, 1.0, 0.5, 0.0]),
    }


def test_mixup_blends_an_image_with_its_partner(batch):
    combined = mixup(batch)
    images = batch["image"]
    assert torch.allclose(combined["image"][0], 0.25 * images[0] + 0.75 * images[1], atol=1e-6)
    assert torch.equal(combined["image"][1], images[1])
    assert torch.allclose(combined["image"][2], (images[2] + images[3]) / 2, atol=1e-6)
    assert torch.allclose(combined["image"][3], images[2], atol=1e-6)
    assert combined["image"].is_contiguous(memory_format=torch.channels_last)
    assert combined["label"].tolist() == [2, 0, -1, -1]
    assert combined["partner_label"].tolist() == [0, 2, -1, -1]
    assert not any(key.startswith("mixup_") for key in combined)


def test_cutmix_shows_the_partner_inside_the_box_only(batch):
    none = [0, 0, 0, 0]
    batch["mixup_box"] = torch.tensor([[2, 1, 5, 6], none, [0, 0, 8, 6], none])
    images, combined = batch["image"], mixup(batch)["image"]
    inside = torch.zeros(8, 6, dtype=torch.bool)
    inside[2:5, 1:6] = True
    assert torch.equal(combined[0][:, inside], images[1][:, inside])
    assert torch.equal(combined[0][:, ~inside], images[0][:, ~inside])
    assert torch.equal(combined[2], images[3])
    assert torch.equal(combined[1], images[1])  # blended with the share 1
    assert torch.allclose(combined[3], images[2], atol=1e-6)  # and with the share 0


def test_stored_probabilities_of_teachers_are_combined_as_the_images(batch):
    probabilities = torch.softmax(torch.randn(4, 5, generator=torch.Generator().manual_seed(1)), 1)
    classes = torch.arange(5).expand(4, 5)
    join = stored_targets(torch.arange(4), classes, probabilities, num_classes=5)
    teacher = mixup(join(batch))["teacher"]
    assert torch.allclose(teacher[0], 0.25 * probabilities[0] + 0.75 * probabilities[1])
    assert torch.allclose(teacher.sum(1), torch.ones(4))


def test_a_batch_that_says_nothing_of_mixing_is_passed_on(batch):
    plain = {key: value for key, value in batch.items() if not key.startswith("mixup_")}
    assert mixup(plain) is plain


def test_the_cross_entropy_of_a_combined_batch_is_that_with_combined_labels(batch):
    class Student(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :5]

    combined = mixup(batch)
    scores = combined["image"].flatten(1)[:, :5].log_softmax(1)
    wanted = torch.stack([0.25 * F.one_hot(torch.tensor(2), 5) + 0.75 * F.one_hot(
        torch.tensor(0), 5), F.one_hot(torch.tensor(0), 5).float()])  # fmt: skip
    expected = -(wanted * scores[:2]).sum(1).mean()
    task = DistillationTask(Student())
    assert torch.allclose(task(combined)["loss"], expected, atol=1e-6)
    unlabelled = {k: v[2:] for k, v in combined.items()}
    assert task(unlabelled)["loss"] == 0


def test_half_precision_stays_half_precision(batch):
    batch["image"] = batch["image"].half()
    assert mixup(batch)["image"].dtype == torch.float16


@pytest.mark.parametrize("box", [None, [[2, 1, 5, 6], [0, 0, 0, 0], [0, 0, 8, 6], [0, 0, 0, 0]]])
def test_strong_views_are_mixed_as_the_weak_ones_are(batch, box):
    if box is not None:
        batch["mixup_box"] = torch.tensor(box)
    other = batch | {"image": batch["image"].flip(0)}
    both = mixup(batch | {"strong": other["image"]})
    assert torch.equal(both["image"], mixup(batch)["image"])
    assert torch.equal(both["strong"], mixup(other)["image"])
