"""Without a process group; over ranks: test_two_ranks.py."""

import torch
from tiny import TinyTask, images
from torch import Tensor, nn

from sbf_dist.train.evaluate import accuracy, predict, synchronise_batchnorm


class Fixed(nn.Module):
    """Answers with the logits that the images hold."""

    def forward(self, image: Tensor) -> Tensor:
        return image


def test_accuracy_of_known_logits() -> None:
    logits = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3], [0, 3, 0]])
    batches = [
        {"image": logits[:3], "label": torch.tensor([0, 1, 1])},
        {"image": logits[3:], "label": torch.tensor([1])},
    ]
    scores = accuracy(Fixed(), batches, "cpu")
    assert (scores.top1, scores.count, scores.top5) == (0.75, 4, None)


class Zeros(nn.Module):
    """Answers with equal logits, but for a little that makes it class 0."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.zeros_like(image).index_fill(1, torch.tensor([0]), 1e-6)


def test_a_reference_is_agreed_with_on_all_images_labelled_or_not() -> None:
    logits = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3], [3, 0, 0]])
    batches = [
        {"image": logits[:3], "label": torch.tensor([0, -1, 1])},
        {"image": logits[3:], "label": torch.tensor([-1])},
    ]
    scores = accuracy(Zeros(), batches, "cpu", Fixed())
    assert scores.count == 2
    assert scores.agreement == 0.5
    probability = logits[0].softmax(0)
    expected = float((probability * (probability.log() + torch.tensor(3.0).log())).sum())
    assert abs(scores.kl - expected) < 1e-5


def test_without_a_reference_there_is_no_agreement() -> None:
    batches = [{"image": torch.eye(3), "label": torch.arange(3)}]
    scores = accuracy(Fixed(), batches, "cpu")
    assert scores.agreement is scores.kl is None


def test_top5_is_told_from_six_classes_on() -> None:
    ranked = torch.arange(6.0, 0, -1).repeat(3, 1)
    scores = accuracy(Fixed(), [{"image": ranked, "label": torch.tensor([0, 4, 5])}], "cpu")
    assert (scores.top1, scores.top5) == (1 / 3, 2 / 3)


def test_predictions_keep_the_order_of_the_batches_and_leave_the_model_as_it_was() -> None:
    student = TinyTask().student
    statistics = student[1].running_mean.clone()
    batches = [images(torch.tensor([5, 3])), images(torch.tensor([9]))]
    ids, probabilities = predict(student, batches, "cpu")
    assert ids.tolist() == [5, 3, 9]
    assert probabilities.shape == (3, 7)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(3))
    assert student.training
    assert torch.equal(student[1].running_mean, statistics)


def test_no_batches_give_no_predictions() -> None:
    ids, probabilities = predict(TinyTask().student, [], "cpu")
    assert (len(ids), len(probabilities)) == (0, 0)


def test_synchronising_batchnorm_without_a_group_changes_nothing() -> None:
    student = TinyTask().student
    student[1].running_mean.fill_(3)
    synchronise_batchnorm(student)
    assert student[1].running_mean.eq(3).all()
