import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sbf_dist.distill.features import feature_loss
from sbf_dist.distill.task import DistillationTask, sharpened, stored_targets
from sbf_dist.distill_recipe import Consistency


class Logits(nn.Module):
    """The image is the logits."""

    def forward(self, x):
        return x


def batch(logits, labels, teacher=None):
    given_batch = {
        "image": torch.tensor(logits, dtype=torch.float32, requires_grad=True),
        "label": torch.tensor(labels),
    }
    if teacher is not None:
        given_batch["teacher"] = torch.tensor(teacher, dtype=torch.float32)
    return given_batch


def test_without_teachers_the_loss_is_the_cross_entropy_by_hand():
    given_batch = batch([[0.0, math.log(3)], [0.0, 0.0]], [1, 0])
    parts = DistillationTask(Logits())(given_batch)
    assert parts.keys() == {"loss"}
    assert parts["loss"].item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


def test_divergence_is_kl_of_teacher_from_student_by_hand():
    given_batch = batch([[0.0, math.log(3)], [0.0, 0.0]], [-1, -1], [[0.5, 0.5], [1.0, 0.0]])
    parts = DistillationTask(Logits())(given_batch)
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = math.log(1 / 0.5)  # and 0 · log 0 = 0
    assert parts["divergence"].item() == pytest.approx((first + second) / 2)
    assert parts["loss"].item() == pytest.approx((first + second) / 2)


def test_both_parts_are_means_over_the_images_they_are_about():
    given_batch = batch([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]], [1, -1, -1], [[0.5, 0.5]] * 3)
    parts = DistillationTask(Logits(), label_weight=0.25)(given_batch)
    assert parts["cross_entropy"].item() == pytest.approx(math.log(1 + math.exp(-1)))
    each = [
        math.log(0.5) - 0.5 * (torch.tensor(row).log_softmax(0).sum().item())
        for row in ([0.0, 1.0], [2.0, 0.0], [0.0, 3.0])
    ]
    assert parts["divergence"].item() == pytest.approx(sum(each) / 3, rel=1e-5)
    assert parts["loss"].item() == pytest.approx(
        0.25 * parts["cross_entropy"].item() + parts["divergence"].item()
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([-1, 0, 1, 2]), min_size=1, max_size=6), st.booleans())
def test_an_image_without_label_never_contributes_to_the_cross_entropy(labels, teachers):
    logits = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(1)).tolist()
    teacher = [[0.2, 0.3, 0.5]] * len(labels) if teachers else None
    given_batch = batch(logits, labels, teacher)
    parts = DistillationTask(Logits())(given_batch)
    cross_entropy = parts["cross_entropy" if teachers else "loss"]
    cross_entropy.backward()
    gradient = given_batch["image"].grad.abs().sum(1)
    labelled = torch.tensor(labels) >= 0
    assert (gradient[~labelled] == 0).all()
    assert (gradient[labelled] > 0).all()
    if not labelled.any():
        assert cross_entropy == 0
        return
    expected = nn.functional.cross_entropy(
        given_batch["image"][labelled], torch.tensor(labels)[labelled]
    )
    torch.testing.assert_close(cross_entropy, expected)


def test_an_agreeing_student_has_no_divergence_and_no_gradient():
    probabilities = [[0.7, 0.2, 0.1]]
    given_batch = batch(torch.tensor(probabilities).log().tolist(), [-1], probabilities)
    parts = DistillationTask(Logits())(given_batch)
    parts["loss"].backward()
    assert parts["loss"].item() == pytest.approx(0, abs=1e-6)
    assert given_batch["image"].grad.abs().max() < 1e-6


def test_loss_is_full_precision_also_for_half_precision_logits():
    given_batch = batch([[0.0, 1.0]], [1], [[0.5, 0.5]])
    given_batch["image"] = given_batch["image"].detach().bfloat16()
    assert DistillationTask(Logits())(given_batch)["loss"].dtype == torch.float32


@given(st.permutations([2, 3, 8, 20]), st.integers(1, 4))
def test_stored_targets_are_joined_by_sample_id(order, count):
    ids = torch.tensor([2, 3, 8, 20])
    classes = torch.tensor([[0, 1], [1, 0], [2, 1], [0, 2]])
    probabilities = torch.tensor([[0.5, 0.25], [0.75, 0.25], [1.0, 0.0], [0.5, 0.125]])
    full = [[0.5, 0.25, 0.25], [0.25, 0.75, 0.0], [0.0, 0.0, 1.0], [0.5, 0.375, 0.125]]
    given_batch = {"id": torch.tensor(order[:count]), "image": torch.zeros(count)}
    annotated = stored_targets(ids, classes, probabilities, num_classes=3)(given_batch)
    assert "teacher" not in given_batch
    assert annotated["image"] is given_batch["image"]
    rows = [[2, 3, 8, 20].index(i) for i in order[:count]]
    assert torch.equal(annotated["teacher"], torch.tensor(full)[rows])


@pytest.mark.parametrize("stranger", [0, 5, 99])
def test_an_image_without_pseudo_label_is_our_own_bug(stranger):
    classes = torch.zeros(2, 1, dtype=torch.int64)
    annotate = stored_targets(torch.tensor([2, 8]), classes, torch.ones(2, 1), num_classes=3)
    with pytest.raises(AssertionError, match="no pseudo-label"):
        annotate({"id": torch.tensor([2, stranger])})


def test_labels_are_smoothed_as_pytorch_does_it_over_the_labelled_images() -> None:
    torch.manual_seed(0)
    scores, label = torch.randn(6, 5), torch.tensor([0, 4, -1, 2, -1, 1])
    task = DistillationTask(torch.nn.Identity(), label_smoothing=0.1)
    loss = task({"image": scores, "label": label})["loss"]
    expected = torch.nn.functional.cross_entropy(
        scores, label, ignore_index=-1, label_smoothing=0.1
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("temperature", [0.25, 0.5, 1, 2])
def test_sharpening_raises_distributions_to_a_power(temperature: float) -> None:
    said = torch.tensor([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    powers = said.double() ** (1 / temperature)
    wanted = (powers / powers.sum(1, keepdim=True)).float()
    torch.testing.assert_close(sharpened(said, temperature), wanted)


# --- further parts -------------------------------------------------------------------------------


def two_views(weak, strong, labels=(-1, -1)):
    return batch(weak, list(labels)) | {"strong": torch.tensor(strong, requires_grad=True)}


def test_a_confident_prediction_on_the_weak_view_is_the_target_on_the_strong_one_by_hand():
    given_batch = two_views([[0.0, 5.0], [0.0, 0.1]], [[1.0, 0.0], [3.0, 0.0]])
    task = DistillationTask(Logits(), consistency=Consistency(weight=0.5, threshold=0.9))
    parts = task(given_batch)
    expected = math.log(1 + math.exp(1.0)) / 2  # class 1 of the first image; of two images
    assert parts["consistency"].item() == pytest.approx(expected)
    assert parts["confident"].item() == 0.5
    assert parts["loss"].item() == pytest.approx(0.5 * expected)
    parts["loss"].backward()
    assert given_batch["image"].grad is None or not given_batch["image"].grad.any()
    assert given_batch["strong"].grad[0].any()
    assert not given_batch["strong"].grad[1].any()


def test_the_ensembles_prediction_may_be_the_target_instead():
    given_batch = two_views([[0.0, 5.0]] * 2, [[1.0, 0.0], [3.0, 0.0]])
    given_batch["teacher"] = torch.tensor([[0.99, 0.01], [0.2, 0.8]])
    own = Consistency(threshold=0.95, target="ensemble")
    parts = DistillationTask(Logits(), teacher_weight=0.0, consistency=own)(given_batch)
    assert parts["consistency"].item() == pytest.approx(math.log(1 + math.exp(-1.0)) / 2)
    assert parts["loss"].item() == pytest.approx(parts["consistency"].item())


def test_both_views_go_through_the_student_at_once():
    seen = []

    class Watching(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x

    given_batch = two_views([[0.0, 5.0]] * 2, [[1.0, 0.0]] * 2)
    DistillationTask(Watching(), consistency=Consistency())(given_batch)
    DistillationTask(Watching())(batch([[0.0, 1.0]], [0]))
    assert seen == [4, 1]


@pytest.mark.parametrize(("progress", "weight"), [(0.0, 1.0), (0.25, 0.8), (1.0, 0.2)])
def test_a_weight_may_go_in_a_straight_line_from_one_number_to_another(progress, weight):
    given_batch = batch([[0.0, 1.0], [2.0, 0.0]], [1, -1], [[0.5, 0.5]] * 2)
    given_batch["progress"] = torch.tensor(progress)
    parts = DistillationTask(Logits(), label_weight=(1.0, 0.2))(given_batch)
    expected = weight * parts["cross_entropy"].item() + parts["divergence"].item()
    assert parts["loss"].item() == pytest.approx(expected)


def test_features_are_part_of_the_loss_and_reach_the_student_alone():
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        for width in (2, 4)
    )
    features = feature_loss(student, teacher, ["1"], (3, 6, 6))
    task = DistillationTask(student, features=features, feature_weight=0.5)
    images = torch.randn(5, 3, 6, 6)
    given_batch = {"image": images, "label": torch.tensor([0, 1, -1, -1, -1])}
    given_batch["features:1"] = teacher[:2](images).detach()
    parts = task(given_batch)
    own = features.projections[0](student[:2](images))
    wanted = given_batch["features:1"]
    expected = (own - wanted).square().mean() / wanted.var(correction=0)
    torch.testing.assert_close(parts["features"], expected)
    torch.testing.assert_close(parts["loss"], parts["cross_entropy"] + 0.5 * expected)
    parts["features"].backward()
    assert student[0].weight.grad.any()
    assert features.projections[0].weight.grad.any()
    assert teacher[0].weight.grad is None
    assert "features" not in task({k: given_batch[k] for k in ("image", "label")})


def test_what_is_off_is_no_part_of_the_module():
    assert set(DistillationTask(nn.Linear(2, 2)).state_dict()) == {"student.weight", "student.bias"}
