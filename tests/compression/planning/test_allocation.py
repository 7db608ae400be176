import re

import pytest
import torch
from small_networks import pictures, small

from sbf_dist import models
from sbf_dist.budget import Budget
from sbf_dist.compression.convert import convert
from sbf_dist.compression.cost import count
from sbf_dist.compression.plan import SBFLayer
from sbf_dist.compression.reconstruct import rebuild
from sbf_dist.errors import UserError
from sbf_dist.settings import Compression


def shrunk(model, budget, **settings):
    wanted = Compression(**budget.given(), **settings)
    return rebuild(model, pictures(), wanted, name="small")


def converted(plan):
    return {n: layer for n, layer in plan.layers.items() if isinstance(layer, SBFLayer)}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("share", [0.4, 0.7, 1.0])
def test_a_budget_of_parameters_is_met(share, norm):
    model = small(norm=norm)
    student, plan = shrunk(model, Budget(params=share))
    assert plan.budget == {"params": share}
    assert plan.params_after == sum(p.numel() for p in student.parameters())
    assert plan.params_after <= share * plan.params_before
    assert plan.params_after >= (share - 0.1) * plan.params_before, "hardly less than allowed"


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_an_absolute_number_is_the_budget_that_its_share_is(kind):
    model = small()
    dense = count(model, (3, 10, 10))
    number = round(0.6 * getattr(dense, kind))
    _, plan = shrunk(model, Budget(**{kind: number}))
    _, same = shrunk(model, Budget(**{kind: number / getattr(dense, kind)}))
    assert plan.budget == {kind: number}
    assert getattr(plan, f"{kind}_after") <= number
    assert plan.layers == same.layers


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_budget_above_the_dense_networks_own_is_refused_and_told_it(kind):
    model = small()
    own = getattr(count(model, (3, 10, 10)), kind)
    with pytest.raises(UserError, match=rf"{kind} = {own + 1} is above the dense network's own "):
        shrunk(model, Budget(**{kind: own + 1}))
    _, plan = shrunk(model, Budget(**{kind: own}))
    assert not converted(plan)


@pytest.mark.parametrize(
    "settings", [{"round_to": 8}, {"floor": 0.7}, {"keep": ["conv1"]}], ids=str
)
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_budget_below_what_is_allowed_names_the_smallest_that_works(kind, settings):
    model = small()
    for wrong in (Budget(**{kind: 0.05}), Budget(**{kind: 10})):
        with pytest.raises(UserError, match="less than floor, round_to and keep allow") as error:
            shrunk(model, wrong, **settings)
        smallest = float(re.search(r"smallest that works is (\S+)$", str(error.value))[1])
        _, plan = shrunk(model, Budget(**{kind: smallest}), **settings)
        limit = smallest if smallest > 1 else smallest * getattr(plan, f"{kind}_before")
        assert getattr(plan, f"{kind}_after") <= limit
        step = 1 if smallest > 1 else 1e-3
        with pytest.raises(UserError):
            shrunk(model, Budget(**{kind: smallest - step}), **settings)


def test_kept_channels_are_multiples_and_narrow_layers_keep_all():
    model = models.build("cifar_resnet8", 5).eval()
    _, plan = shrunk(model, Budget(macs=0.7), round_to=16)
    assert converted(plan)
    for layer in plan.layers.values():
        if isinstance(layer, SBFLayer):
            assert len(layer.kept) % 16 == 0
    narrow = plan.layers["stages.0.0.conv1"].reason
    assert narrow.startswith("its 16 filters are no more than floor and round_to keep; ")


def test_layers_that_are_named_are_left_alone_and_the_plan_says_who_asked():
    _, plan = shrunk(small(), Budget(macs=0.8), keep=["conv2"])
    assert list(converted(plan)) == ["conv1"]
    assert "'conv2'" in plan.layers["conv2"].reason
    assert not plan.layers["conv2"].convertible
    assert any("conv2" in line and "Unchanged" in line for line in plan.explanation)


def test_each_layer_gets_the_transformation_size_that_serves_it():
    """conv1's filters are sums of others of it, conv2's are others of it shifted by a pixel."""
    model = small(norm=False)
    model.conv2 = torch.nn.Conv2d(16, 16, 3, padding=1)
    with torch.no_grad():
        mix = torch.randn(16, 4)
        model.conv1.weight.copy_(torch.einsum("ck,kiab->ciab", mix, model.conv1.weight[:4]) / 2)
        points = torch.zeros(16, 16, 3, 3)
        points[:4, :, 1, 1] = 0.3 * torch.randn(4, 16)
        for group, (row, column) in enumerate([(0, 1), (1, 0), (2, 2)], 1):
            points[4 * group : 4 * group + 4, :, row, column] = points[:4, :, 1, 1]
        model.conv2.weight.copy_(points)
    student, plan = shrunk(model, Budget(macs=0.4))
    sizes = {name: layer.transform_size for name, layer in converted(plan).items()}
    assert sizes == {"conv1": 1, "conv2": 3}
    again = convert(model, plan)
    assert again.conv1.transforms.shape == student.conv1.transforms.shape


def test_a_network_that_has_sbf_layers_is_refused_in_one_line():
    student, plan = shrunk(small(), Budget(macs=0.5))
    name = next(iter(converted(plan)))
    with pytest.raises(UserError) as error:
        shrunk(student, Budget(macs=0.4))
    assert str(error.value) == (
        f"model 'small' has an SBF layer already ({name}): sbf_dist.shrink makes it smaller"
    )
