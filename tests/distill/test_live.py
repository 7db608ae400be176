import torch
from torch import nn

from sbf_dist.distill.live import feature_targets, live_targets
from sbf_dist.distill.teachers import Member, TeacherEnsemble
from sbf_dist.settings import View

VIEW = View(image_size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
OTHER = View(image_size=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))


def ensemble() -> TeacherEnsemble:
    torch.manual_seed(0)
    networks = [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        for _ in range(2)
    ]
    views = (VIEW, OTHER)
    return TeacherEnsemble(
        [
            # The features are those of an image itself, not of its mirror image.
            Member(str(number), network, view, views=2)
            for number, (network, view) in enumerate(zip(networks, views, strict=True))
        ]
    )


def test_live_targets_are_the_ensembles_answer_to_the_very_images():
    given = {"image": torch.randn(3, 3, 8, 8), "label": torch.zeros(3)}
    teachers = ensemble()
    found = live_targets(teachers, VIEW)(given)
    assert torch.equal(found["teacher"], teachers(given["image"], VIEW))
    assert not found["teacher"].requires_grad
    assert found["image"] is given["image"]


def test_features_are_those_of_the_same_pass_or_of_one_of_the_member_alone():
    given = {"image": torch.randn(3, 3, 8, 8)}
    teachers = ensemble()
    ask = live_targets(teachers, VIEW)
    both = feature_targets(teachers, 1, VIEW, ["1"], ask)(given)
    alone = feature_targets(teachers, 1, VIEW, ["1"], None)(given)
    assert torch.equal(both["teacher"], ask(given)["teacher"])
    assert "teacher" not in alone
    assert torch.equal(both["features:1"], alone["features:1"])
    seen = (given["image"] * 0.5 + 0.5 - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / 0.2
    expected = teachers.members[1].network[:2](seen)
    torch.testing.assert_close(alone["features:1"], expected)
    assert not alone["features:1"].requires_grad
