import pytest
import timm
import torchvision
from torch import nn

from sbf_dist import models
from sbf_dist.heads import head_of, is_known, is_within


class Own(nn.Module):
    """Registers a linear layer of its trunk first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.answer = nn.Linear(4, 3)
        self.late = nn.Conv2d(3, 4, 1)


@pytest.mark.parametrize(
    ("build", "head"),
    [
        (lambda: timm.create_model("test_resnet"), "fc"),
        (lambda: timm.create_model("test_convnext"), "head.fc"),
        (torchvision.models.squeezenet1_1, "classifier.1"),
        (torchvision.models.mobilenet_v3_small, "classifier.3"),
        (lambda: models.build("cifar_resnet8_w4", 3), "head"),
        (Own, "answer"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), "1"),
    ],
    ids=["timm", "timm, nested", "convolution", "torchvision", "cifar", "own", "convolutions"],
)
def test_the_head_is_what_the_library_says_or_the_last_linear_layer(build, head) -> None:
    assert head_of(build()) == (head,)


def test_a_network_may_have_no_head() -> None:
    assert head_of(nn.ReLU()) == ()


def test_a_classifier_that_was_left_out_is_not_the_head() -> None:
    without = timm.create_model("test_resnet", num_classes=0)
    (head,) = head_of(without)
    assert isinstance(without.get_submodule(head), nn.Conv2d)


def test_only_the_networks_of_libraries_are_known() -> None:
    assert is_known(models.build("cifar_resnet8_w4", 3))
    assert is_known(torchvision.models.squeezenet1_1())
    assert not is_known(Own())


def test_a_name_is_within_a_module_not_within_one_whose_name_begins_alike() -> None:
    assert is_within("head.weight", ("head",))
    assert not is_within("head2.weight", ("head",))
