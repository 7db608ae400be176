import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import Small, pictures, small

from sbf_dist import models
from sbf_dist.budget import Budget
from sbf_dist.compression.convert import convert
from sbf_dist.compression.cost import count
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.plan import Plan, SBFLayer
from sbf_dist.compression.planning.criteria import CRITERIA
from sbf_dist.compression.progressive import round_budgets, shrink
from sbf_dist.compression.reconstruct import rebuild
from sbf_dist.errors import UserError
from sbf_dist.settings import Compression

SHAPE = (3, 10, 10)


def converted(plan):
    return {n: layer for n, layer in plan.layers.items() if isinstance(layer, SBFLayer)}


def first_round(model, macs=0.7, **settings):
    return rebuild(model, pictures(48), Compression(macs=macs, **settings), name="small")


def trained(student, images, steps=5):
    """A few steps to labels that the student did not have, so that all its weights move."""
    student = copy.deepcopy(student).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    labels = torch.arange(len(images)) % 5
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(student(images), labels).backward()
        optimizer.step()
    return student.eval()


def divergence(model, student, images):
    with torch.no_grad():
        expected, found = model(images).log_softmax(1), student(images).log_softmax(1)
    return F.kl_div(found, expected, reduction="batchmean", log_target=True).item()


# --- budgets of rounds ---------------------------------------------------------------------------


@settings(deadline=None)
@given(
    share=st.floats(0.01, 1), rounds=st.integers(1, 12), kind=st.sampled_from(["macs", "params"])
)
def test_budgets_shrink_round_by_round_less_and_less_to_the_final_one(share, rounds, kind):
    budgets = round_budgets(Budget(**{kind: share}), rounds)
    assert len(budgets) == rounds
    assert budgets[-1] == Budget(**{kind: share})
    left = [1.0, *(budget.value for budget in budgets)]
    steps = [a - b for a, b in itertools.pairwise(left)]
    assert all(step >= -1e-12 for step in steps)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(steps))


def test_the_schedule_is_cubic():
    budgets = round_budgets(Budget(macs=0.2), 2)
    assert [b.value for b in budgets] == pytest.approx([1 - 0.8 * (1 - 0.5**3), 0.2])


def test_a_number_is_shared_out_over_rounds_as_its_share_is():
    budgets = round_budgets(Budget(params=200), 2, dense=1000)
    assert [b.value for b in budgets] == pytest.approx([1 - 0.8 * (1 - 0.5**3), 200])


def test_rounds_to_a_time_are_refused():
    assert round_budgets(Budget(latency=0.5), 1) == [Budget(latency=0.5)]
    with pytest.raises(UserError, match=r"rounds = 2 needs a budget of macs or params, not late"):
        round_budgets(Budget(latency_ms=3), 2)


# --- shrinking -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Budget(macs=0.4), Budget(params=0.4)], ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_a_trained_student_is_shrunk_to_a_smaller_budget_of_the_dense_network(budget, norm):
    model, images = small(norm=norm), pictures(48)
    student, plan = first_round(model)
    student = trained(student, images)
    smaller, new = shrink(student, plan, images, Compression(**budget.given()))
    cost = count(smaller, SHAPE)
    assert (new.macs_after, new.params_after) == (cost.macs, cost.params)
    assert getattr(new, f"{budget.kind}_after") <= 0.4 * getattr(plan, f"{budget.kind}_before")
    assert (new.macs_before, new.budget) == (plan.macs_before, budget.given())
    for name, layer in converted(plan).items():
        after = new.layers[name]
        assert set(after.kept) <= set(layer.kept), "what was rebuilt stays rebuilt"
        assert after.macs_before == layer.macs_before
        assert after.macs_after <= layer.macs_after
        assert cost.layers[name] == after.macs_after
        assert after.reason
    assert any(len(new.layers[n].kept) < len(layer.kept) for n, layer in converted(plan).items())


def test_the_new_plan_makes_the_smaller_network_of_the_dense_one():
    model = small()
    student, plan = first_round(model)
    smaller, new = shrink(student, plan, pictures(48), Compression(macs=0.4))
    again = convert(Small(), Plan.model_validate_json(new.model_dump_json())).eval()
    again.load_state_dict(smaller.state_dict())
    x = pictures(4)
    assert torch.equal(again(x), smaller(x))


def test_the_student_is_left_as_it_was():
    student, plan = first_round(small())
    student.train()
    before = copy.deepcopy(student.state_dict())
    digest = plan.digest()
    shrink(student, plan, pictures(48), Compression(macs=0.4))
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert student.training
    assert plan.digest() == digest


def test_a_budget_that_is_met_already_changes_nothing_but_the_reasons():
    student, plan = first_round(small())
    again, new = shrink(student, plan, pictures(48), Compression(macs=0.8, refit=False))
    x = pictures(5)
    torch.testing.assert_close(again(x), student(x), rtol=1e-3, atol=1e-3)
    for name, layer in converted(plan).items():
        assert new.layers[name].model_copy(update={"reason": ""}) == layer.model_copy(
            update={"reason": ""}
        )


def test_the_shrunk_network_follows_the_trained_one_and_not_the_dense():
    model, images = small(), pictures(64)
    student, plan = first_round(model)
    student = trained(student, images, steps=40)
    smaller, _ = shrink(student, plan, images, Compression(macs=0.6))
    assert divergence(student, smaller, images) < divergence(model, smaller, images)


def test_it_may_be_fitted_to_the_dense_network_instead():
    model, images = small(), pictures(64)
    student, plan = first_round(model)
    student = trained(student, images)
    own, _ = shrink(student, plan, images, Compression(macs=0.6))
    towards, _ = shrink(student, plan, images, Compression(macs=0.6), reference=Reference(model))
    assert divergence(model, towards, images) < divergence(model, own, images)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_shrinks(criterion):
    student, plan = first_round(small())
    smaller, new = shrink(student, plan, pictures(48), Compression(macs=0.4, criterion=criterion))
    assert new.criterion == criterion
    assert all(parameter.isfinite().all() for parameter in smaller.parameters())
    for name, layer in converted(plan).items():
        assert set(new.layers[name].kept) <= set(layer.kept)


def test_without_mixtures_no_dense_layer_becomes_one():
    student, plan = first_round(small(), 0.85, keep=["conv2"])

    def sources(mixtures):
        settings = Compression(macs=0.5, sources=1, mixtures=mixtures)
        _, new = shrink(student, plan, pictures(48), settings)
        return len(converted(new)["conv2"].sources[0])

    assert sources(mixtures=True) > 1  # which only a mixture has here
    assert sources(mixtures=False) == 1


def test_layers_that_are_kept_stay_as_they_are():
    student, plan = first_round(small(), macs=0.6)
    name = next(iter(converted(plan)))
    smaller, new = shrink(student, plan, pictures(48), Compression(macs=0.55, keep=[name]))
    assert new.layers[name].kept == plan.layers[name].kept
    x = smaller.get_submodule(name)
    assert torch.equal(x.basis.weight, student.get_submodule(name).basis.weight)


def test_dense_layers_may_be_converted_in_a_later_round():
    model = models.build("cifar_resnet8", 5).eval()
    student, plan = rebuild(model, pictures(), Compression(macs=0.9), name="cifar_resnet8")
    smaller, new = shrink(student, plan, pictures(), Compression(macs=0.4))
    assert set(converted(plan)) < set(converted(new))
    assert list(new.layers) == list(plan.layers)
    assert count(smaller, SHAPE).macs == new.macs_after <= 0.4 * plan.macs_before


def test_a_time_is_refused_and_a_budget_too_small_names_the_smallest():
    student, plan = first_round(small())
    with pytest.raises(UserError, match=r"cannot be shrunk to latency = 0\.4: give macs or params"):
        shrink(student, plan, pictures(48), Compression(latency=0.4))
    with pytest.raises(UserError, match=r"smallest that works is 0\.\d+$"):
        shrink(student, plan, pictures(48), Compression(macs=0.01))


def test_something_between_is_refused_where_layers_are_shrunk_again():
    student, plan = first_round(small())
    wanted = Compression(macs=0.4, between="bn_relu")
    with pytest.raises(UserError, match=r"between = 'bn_relu': .*it must be None"):
        shrink(student, plan, pictures(48), wanted)


def test_another_networks_plan_is_refused():
    student, plan = first_round(small())
    name = next(iter(converted(plan)))
    layers = {n: layer for n, layer in plan.layers.items() if n != name}
    with pytest.raises(UserError, match=f"plan does not make {name} an SBF layer"):
        shrink(
            student, plan.model_copy(update={"layers": layers}), pictures(), Compression(macs=0.4)
        )
