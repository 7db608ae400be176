import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sbf_dist.distill.teachers import TeacherEnsemble, translate
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


def ensemble(*networks, weights=None, views=None, **settings):
    return TeacherEnsemble(
        networks,
        views or [PHOTO] * len(networks),
        weights or [1.0] * len(networks),
        **settings,
    )


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


def test_an_engine_that_wraps_a_task_does_not_find_the_teachers():
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Linear(2, 2)
            self.teachers = ensemble(Says(0, 1))

    task = Task()
    assert len(list(task.parameters())) == 2
    task.train()
    assert not task.teachers.networks[0].training


def test_probabilities_are_full_precision_also_under_autocast():
    teachers = ensemble(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), dtype=torch.bfloat16)
    seen = []
    teachers.networks[0][1].register_forward_hook(lambda *a: seen.append(a[2].dtype))
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
