import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import Silent
from torch import nn

from sbf_dist import models
from sbf_dist.distill.class_mapping import ClassMapping
from sbf_dist.distill.teachers import Member, TeacherEnsemble, translate
from sbf_dist.errors import UserError
from sbf_dist.settings import View

PHOTO = View(image_size=8, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CENTRED = View(image_size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Says(nn.Module):
    """Answers with the same logits for every image, and notes what it was given."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float32))
        self.seen: list[torch.Tensor] = []

    def forward(self, x):
        assert not self.training, "a teacher in training mode"
        self.seen.append(x)
        return self.logits.expand(len(x), -1)


def ensemble(*networks, weights=None, views=None, temperature=1.0, **settings):
    members = [
        Member(f"teacher-{number}", network, view, weight, temperature=temperature)
        for number, (network, view, weight) in enumerate(
            zip(
                networks,
                views or [PHOTO] * len(networks),
                weights or [1.0] * len(networks),
                strict=True,
            ),
            1,
        )
    ]
    return TeacherEnsemble(members, **settings)


def test_the_word_of_the_ensemble_is_the_weighted_mean_of_probabilities_by_hand():
    teachers = ensemble(Says(0, math.log(3)), Says(math.log(9), 0), weights=[1, 3])
    # (1/4, 3/4) with weight 1/4 and (9/10, 1/10) with weight 3/4
    expected = torch.tensor([[0.25 / 4 + 0.9 * 3 / 4, 0.75 / 4 + 0.1 * 3 / 4]])
    said = teachers(torch.zeros(2, 3, 8, 8), PHOTO)
    torch.testing.assert_close(said, expected.expand(2, -1))


def test_temperature_softens_each_teacher_before_the_mean():
    teachers = ensemble(Says(0, 2 * math.log(3)), Says(0, 0), temperature=2)
    said = teachers(torch.zeros(1, 3, 8, 8), PHOTO)
    torch.testing.assert_close(said, torch.tensor([[(0.25 + 0.5) / 2, (0.75 + 0.5) / 2]]))


def test_the_teachers_are_frozen_in_evaluation_mode_and_give_no_gradients():
    network = Says(0, 1).train()
    teachers = ensemble(network)
    images = torch.zeros(1, 3, 8, 8, requires_grad=True)
    said = teachers(images, PHOTO)
    assert not network.training
    assert not network.logits.requires_grad
    assert not said.requires_grad


def test_a_teacher_whose_train_returns_nothing_is_frozen_too():
    class Quiet(Says):
        def train(self, mode=True):
            super().train(mode)

    network = Quiet(0, 1)
    ensemble(network)
    assert not network.training
    assert not network.logits.requires_grad


def test_an_engine_that_wraps_a_task_does_not_find_the_teachers():
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Linear(2, 2)
            self.teachers = ensemble(Says(0, 1))

    task = Task()
    assert len(list(task.parameters())) == 2
    task.train()
    assert not task.teachers.members[0].network.training


def test_probabilities_are_full_precision_also_under_autocast():
    teachers = ensemble(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), dtype=torch.bfloat16)
    seen = []
    teachers.members[0].network[1].register_forward_hook(lambda *a: seen.append(a[2].dtype))
    said = teachers(torch.randn(4, 3, 8, 8), PHOTO)
    assert seen == [torch.bfloat16]
    assert said.dtype == torch.float32
    torch.testing.assert_close(said.sum(1), torch.ones(4))


def test_each_teacher_sees_the_images_in_its_own_view():
    one, other = Says(0, 1), Says(1, 0)
    small = View(image_size=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    teachers = ensemble(one, other, views=[PHOTO, small])
    images = torch.randn(2, 3, 8, 8)
    teachers(images, PHOTO)
    assert torch.equal(one.seen[0], images)
    torch.testing.assert_close(other.seen[0], translate(images, PHOTO, small))
    assert other.seen[0].shape == (2, 3, 4, 4)
    # On images of its own view it is asked directly, and says the same.
    teachers.probabilities(1, other.seen[0])
    assert torch.equal(other.seen[1], other.seen[0])


@pytest.mark.parametrize("view", [PHOTO, CENTRED])
def test_translating_gives_the_normalisation_that_the_other_view_wants(view):
    pixels = torch.rand(2, 3, 8, 8)

    def normalised(to):
        mean, std = (torch.tensor(values)[:, None, None] for values in (to.mean, to.std))
        return (pixels - mean) / std

    for to in (PHOTO, CENTRED):
        torch.testing.assert_close(translate(normalised(view), view, to), normalised(to))


values = st.floats(0.05, 0.95)


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[values] * 3), st.tuples(*[values] * 3), st.integers(1, 3), st.integers(4, 12))
def test_there_and_back_again_are_the_same_images(mean, std, images, size):
    view = View(image_size=size, mean=PHOTO.mean, std=PHOTO.std)
    other = View(image_size=size, mean=mean, std=std)
    x = torch.randn(images, 3, size, size)
    back = translate(translate(x, view, other), other, view)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)


def test_a_resized_image_keeps_its_colour_and_its_place():
    large = View(image_size=16, mean=PHOTO.mean, std=PHOTO.std)
    image = torch.zeros(1, 3, 16, 16)
    image[:, :, :8, :8] = 1.0
    small = translate(image, large, PHOTO)
    assert small.shape == (1, 3, 8, 8)
    torch.testing.assert_close(small[:, :, :3, :3], torch.ones(1, 3, 3, 3))
    torch.testing.assert_close(small[:, :, 5:, 5:], torch.zeros(1, 3, 3, 3))
    assert small.mean().item() == pytest.approx(image.mean().item(), abs=1e-3)


def test_a_smaller_view_is_not_aliased():
    stripes = torch.tensor([1.0, 0, 0, 0]).repeat(4).expand(1, 3, 16, 16)
    small = translate(
        stripes,
        View(image_size=16, mean=PHOTO.mean, std=PHOTO.std),
        View(image_size=4, mean=PHOTO.mean, std=PHOTO.std),
    )
    assert small[..., 1:3].mean().item() == pytest.approx(0.25, abs=0.1)


def test_a_view_of_its_own_leaves_images_alone():
    x = torch.randn(1, 3, 8, 8)
    assert translate(x, PHOTO, PHOTO) is x


# --- views, classes, faults ----------------------------------------------------------------------


class LeftColumn(nn.Module):
    """Answers with the mean of the left column, and of all columns."""

    def forward(self, x):
        return torch.stack([x[:, 0, :, 0].mean(1), x[:, 0].mean((1, 2))], 1)


def test_two_views_are_the_mean_of_the_answers_to_an_image_and_its_mirror_image():
    images = torch.randn(3, 3, 8, 8)
    one = TeacherEnsemble([Member("one", LeftColumn(), PHOTO)])
    both = TeacherEnsemble([Member("one", LeftColumn(), PHOTO, views=2)])
    expected = (one(images, PHOTO) + one(images.flip(3), PHOTO)) / 2
    torch.testing.assert_close(both(images, PHOTO), expected)
    assert not torch.allclose(both(images, PHOTO), one(images, PHOTO))


def test_a_teacher_of_other_classes_answers_with_those_of_the_images():
    # Of its four classes the images have three as two: 0 and 3 are their first, 1 their second.
    mapping = ClassMapping(4, torch.tensor([0, 1, 3]), torch.tensor([0, 1, 0]), classes=2)
    teacher = Says(math.log(1), math.log(4), math.log(90), math.log(5))
    said = TeacherEnsemble([Member("one", teacher, PHOTO, mapping=mapping)])(
        torch.zeros(2, 3, 8, 8), PHOTO
    )
    torch.testing.assert_close(said, torch.tensor([[0.6, 0.4]]).expand(2, -1))


def test_what_the_images_do_not_have_may_have_all_of_the_probability():
    mapping = ClassMapping(3, torch.tensor([0, 1]), torch.tensor([1, 0]), classes=2)
    teacher = Member("one", Says(0, math.log(3), 500), PHOTO, mapping=mapping)
    said = TeacherEnsemble([teacher])(torch.zeros(1, 3, 8, 8), PHOTO)
    torch.testing.assert_close(said, torch.tensor([[0.75, 0.25]]))


def test_networks_of_all_libraries_answer_together_each_in_its_own_way():
    torch.manual_seed(0)
    mapping = ClassMapping(5, torch.tensor([4, 1, 2]), torch.tensor([0, 1, 2]), classes=3)
    small = View(image_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    large = View(image_size=40, mean=PHOTO.mean, std=PHOTO.std)
    student = View(image_size=32, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))
    members = [
        Member("timm", models.build("timm:test_resnet", 3), large, weight=2.0),
        Member("torchvision", models.build("torchvision:squeezenet1_1", 5), large, mapping=mapping),
        Member("ours", models.build("cifar_resnet8_w4", 3), small, views=2),
        Member("own", nn.Sequential(nn.Flatten(), nn.Linear(3 * 32**2, 3)), student, weight=0.5),
    ]
    images = torch.randn(2, 3, 32, 32)
    said = TeacherEnsemble(members, num_classes=3)(images, student)
    expected = torch.zeros(2, 3)
    with torch.no_grad():
        for member in members:
            seen = translate(images, student, member.view)
            answers = member.network(seen).softmax(1)
            if member.name == "torchvision":
                answers = answers[:, [4, 1, 2]] / answers[:, [4, 1, 2]].sum(1, keepdim=True)
            if member.name == "ours":
                answers = (answers + member.network(seen.flip(3)).softmax(1)) / 2
            expected += member.weight / 4.5 * answers
    torch.testing.assert_close(said, expected)


def test_a_teacher_that_answers_nan_is_named():
    teachers = ensemble(Says(0, 1), Says(0, math.nan))
    with pytest.raises(
        UserError, match="teacher teacher-2: its predictions are not finite numbers;"
    ):
        teachers(torch.zeros(1, 3, 8, 8), PHOTO)
        teachers.check()


def test_a_fault_is_kept_until_it_is_asked_for():
    teacher = Says(0, math.inf)
    teachers = ensemble(Says(0, 1), teacher, dtype=torch.bfloat16)
    assert teachers.faults().tolist() == [False, False]
    teachers.probabilities(1, torch.zeros(1, 3, 8, 8))
    teacher.logits.data[1] = 0
    teachers.probabilities(1, torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match=r"teacher-2: .* not finite numbers \(in bfloat16\)"):
        teachers.check()
    assert teachers.faults().tolist() == [False, True]


@pytest.mark.parametrize("num_classes", [None, 3])
def test_teachers_that_disagree_on_the_classes_are_named_with_their_numbers(num_classes):
    teachers = ensemble(Says(0, 1, 2), Says(0, 1), num_classes=num_classes)
    images = "" if num_classes is None else "; the images have 3"
    with pytest.raises(UserError) as error:
        teachers(torch.zeros(1, 3, 8, 8), PHOTO)
    assert f"not the same: teacher-1 has 3, teacher-2 has 2{images}; a teacher" in str(error.value)


def test_a_teacher_of_another_number_of_classes_than_the_images_is_refused():
    with pytest.raises(UserError, match="teacher-1 has 2; the images have 3"):
        ensemble(Says(0, 1), num_classes=3)(torch.zeros(1, 3, 8, 8), PHOTO)


def test_a_file_of_classes_that_is_not_the_teachers_is_refused():
    mapping = ClassMapping(4, torch.tensor([0]), torch.tensor([0]), classes=1)
    teachers = TeacherEnsemble([Member("one", Says(0, 1), PHOTO, mapping=mapping)])
    with pytest.raises(UserError, match=r"teacher one: predicts 2 classes, its file .* has 4"):
        teachers(torch.zeros(1, 3, 8, 8), PHOTO)


def test_what_answers_cost_is_measured_when_asked_for():
    teachers = ensemble(Says(0, 1), Says(0, 1))
    teachers(torch.zeros(4, 3, 8, 8), PHOTO)
    assert teachers.costs() == {}
    teachers.measure()
    teachers.probabilities(1, torch.zeros(4, 3, 8, 8))
    assert teachers.costs().keys() == {"teacher-2"}
    cost = teachers.costs()["teacher-2"]
    assert cost.ms_per_image > 0
    assert cost.peak_mb is None


def test_a_teacher_whose_train_returns_nothing_will_do():
    teachers = ensemble(Silent(Says(0, 0)))
    probabilities = teachers(torch.rand(2, 3, 8, 8), PHOTO)
    torch.testing.assert_close(probabilities, torch.full((2, 2), 0.5))
