import pytest

from launchers.estimate.student import even_student
from sbf_dist import models
from sbf_dist.compression.cost import count
from sbf_dist.layers import SBFConv2d
from sbf_dist.recipe import Compress

SHAPE = (3, 32, 32)


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"macs": 0.8}, {"params": 0.5}])
def test_an_even_student_costs_just_about_the_budget(budget):
    dense = models.build("cifar_resnet14", 10)
    student = even_student(dense, Compress(teacher="a", **budget), SHAPE)
    before, after = count(dense, SHAPE), count(student, SHAPE)
    reached = after.macs / before.macs if "macs" in budget else after.params / before.params
    (wanted,) = budget.values()
    assert wanted - 0.05 < reached <= wanted


def test_layers_that_the_recipe_keeps_are_kept():
    dense = models.build("cifar_resnet14", 10)
    name = next(n for n, _ in dense.named_modules() if n.endswith("conv1") and "." in n)
    student = even_student(dense, Compress(teacher="a", macs=0.6, keep=[name]), SHAPE)
    assert not isinstance(student.get_submodule(name), SBFConv2d)
    assert any(isinstance(module, SBFConv2d) for module in student.modules())
