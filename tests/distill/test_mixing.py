import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sbf_dist.distill.mixing import mix
from sbf_dist.distill.task import DistillationTask, stored_targets


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 8, 6, generator=generator)
    return {
        "image": images.to(memory_format=torch.channels_last),
        "label": torch.tensor([2, 0, -1, -1]),
        "id": torch.arange(4),
        "mix_partner": torch.tensor([1, 0, 3, 2]),
        "mix_share": torch.tensor([0.25, 1.0, 0.5, 0.0]),
    }


def test_mixup_blends_an_image_with_its_partner(batch):
    mixed = mix(batch)
    images = batch["image"]
    assert torch.allclose(mixed["image"][0], 0.25 * images[0] + 0.75 * images[1], atol=1e-6)
    assert torch.equal(mixed["image"][1], images[1])
    assert torch.allclose(mixed["image"][2], (images[2] + images[3]) / 2, atol=1e-6)
    assert torch.allclose(mixed["image"][3], images[2], atol=1e-6)
    assert mixed["image"].is_contiguous(memory_format=torch.channels_last)
    assert mixed["label"].tolist() == [2, 0, -1, -1]
    assert mixed["partner_label"].tolist() == [0, 2, -1, -1]
    assert not any(key.startswith("mix_") for key in mixed)


def test_cutmix_shows_the_partner_inside_the_box_only(batch):
    none = [0, 0, 0, 0]
    batch["mix_box"] = torch.tensor([[2, 1, 5, 6], none, [0, 0, 8, 6], none])
    images, mixed = batch["image"], mix(batch)["image"]
    inside = torch.zeros(8, 6, dtype=torch.bool)
    inside[2:5, 1:6] = True
    assert torch.equal(mixed[0][:, inside], images[1][:, inside])
    assert torch.equal(mixed[0][:, ~inside], images[0][:, ~inside])
    assert torch.equal(mixed[2], images[3])
    assert torch.equal(mixed[1], images[1])  # blended with the share 1
    assert torch.allclose(mixed[3], images[2], atol=1e-6)  # and with the share 0


def test_stored_words_of_teachers_are_mixed_as_the_images(batch):
    probabilities = torch.softmax(torch.randn(4, 5, generator=torch.Generator().manual_seed(1)), 1)
    classes = torch.arange(5).expand(4, 5)
    join = stored_targets(torch.arange(4), classes, probabilities, count=5)
    teacher = mix(join(batch))["teacher"]
    assert torch.allclose(teacher[0], 0.25 * probabilities[0] + 0.75 * probabilities[1])
    assert torch.allclose(teacher.sum(1), torch.ones(4))


def test_a_batch_that_says_nothing_of_mixing_is_passed_on(batch):
    plain = {key: value for key, value in batch.items() if not key.startswith("mix_")}
    assert mix(plain) is plain


def test_the_cross_entropy_of_a_mixed_batch_is_that_with_mixed_labels(batch):
    class Student(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :5]

    mixed = mix(batch)
    scores = mixed["image"].flatten(1)[:, :5].log_softmax(1)
    wanted = torch.stack([0.25 * F.one_hot(torch.tensor(2), 5) + 0.75 * F.one_hot(
        torch.tensor(0), 5), F.one_hot(torch.tensor(0), 5).float()])  # fmt: skip
    expected = -(wanted * scores[:2]).sum(1).mean()
    task = DistillationTask(Student())
    assert torch.allclose(task(mixed)["loss"], expected, atol=1e-6)
    unlabelled = {k: v[2:] for k, v in mixed.items()}
    assert task(unlabelled)["loss"] == 0


def test_half_precision_stays_half_precision(batch):
    batch["image"] = batch["image"].half()
    assert mix(batch)["image"].dtype == torch.float16
