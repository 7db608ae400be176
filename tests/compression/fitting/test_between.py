import pytest
import torch
from small_networks import Small, pictures, small
from torch import nn

from sbf_dist.budget import Budget
from sbf_dist.compression.convert import convert, make_between
from sbf_dist.compression.cost import count
from sbf_dist.compression.fitting.between import insert_between
from sbf_dist.compression.fitting.statistics import run_until
from sbf_dist.compression.plan import Plan, SBFLayer
from sbf_dist.compression.progressive import shrink
from sbf_dist.compression.reconstruct import rebuild
from sbf_dist.errors import UserError
from sbf_dist.settings import Compression


def shrunk(budget=None, **settings):
    model = small(norm=settings.pop("norm", True))
    given = (budget or Budget(macs=0.5)).given()
    return rebuild(model, pictures(), Compression(**given, **settings))


def converted(plan):
    return {n: layer for n, layer in plan.layers.items() if isinstance(layer, SBFLayer)}


def test_a_layer_starts_as_what_was_fitted_but_for_borders_and_tails():
    student, plan = shrunk(norm=False)
    layers = converted(plan)
    (name,) = [n for n in layers if n == "conv1"]
    before = run_until(student, name, pictures(), output=True)
    planned = insert_between(student, layers, [pictures()], "bn_relu")
    student.eval()
    after = run_until(student, name, pictures(), output=True)
    inner = (after - before)[:, :, 1:-1, 1:-1]
    assert inner.square().mean() < 2e-3 * before.var()
    assert torch.equal(after[:, layers[name].kept], before[:, layers[name].kept])
    assert {layer.between for layer in planned.values()} == {"bn_relu"}
    norm = student.get_submodule(name).between[0]
    z = (
        before[:, layers[name].kept]
        - student.get_submodule(name).bias[layers[name].kept, None, None]
    )
    torch.testing.assert_close(norm.running_mean, z.mean((0, 2, 3)).detach(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("budget", [Budget(macs=0.5), Budget(params=0.5)], ids=str)
def test_a_student_with_something_between_is_within_its_budget_and_made_by_its_plan(budget):
    student, plan = shrunk(budget, between="bn_relu")
    layers = converted(plan)
    assert layers
    assert {layer.between for layer in layers.values()} == {"bn_relu"}
    cost = count(student, (3, 10, 10))
    assert (cost.macs, cost.params) == (plan.macs_after, plan.params_after)
    dense = getattr(plan, f"{budget.kind}_before")
    assert getattr(plan, f"{budget.kind}_after") <= 0.5 * dense
    again = convert(Small(), Plan.model_validate_json(plan.model_dump_json())).eval()
    again.load_state_dict(student.state_dict())
    x = pictures(4)
    assert torch.equal(again(x), student(x))


def test_plans_without_it_do_not_mention_it():
    _, plan = shrunk()
    assert "between" not in plan.model_dump_json(exclude_none=True)


def test_layers_with_something_between_are_not_shrunk_again():
    student, plan = shrunk(between="bn_relu")
    with pytest.raises(UserError, match="has bn_relu between basis and transformations"):
        shrink(student, plan, pictures(), Compression(macs=0.4))


def test_it_has_the_dtype_that_is_asked_for():
    made = make_between("bn_relu", 3, torch.zeros(1, dtype=torch.double))
    assert isinstance(made[0], nn.BatchNorm2d)
    assert made[0].weight.dtype == torch.double
    assert make_between(None, 3, torch.zeros(1)) is None
