import copy

import pytest
import torch
import torch.nn.functional as F
from small_networks import Small, pictures, small
from torch import nn

from sbf_dist.compression.fitting.norms import following_norms
from sbf_dist.compression.fitting.statistics import MomentSums, neighbourhoods, run_until
from sbf_dist.compression.fitting.transforms import rank_channels
from sbf_dist.compression.holding_out import split
from sbf_dist.compression.outputs import TEMPERATURE
from sbf_dist.compression.planning.criteria import CRITERIA, Ranking, rankings
from sbf_dist.compression.prepared_images import calibration_for
from sbf_dist.compression.reconstruct import rebuild
from sbf_dist.errors import UserError
from sbf_dist.settings import Compression

NAMES = ["conv1", "conv2"]


def batches():
    return iter(pictures(24).split(8))


def scores(criterion, model=None, seed=0):
    model = model or small()
    with torch.no_grad():
        return {
            name: ranking.scores
            for name, ranking in rankings(model, NAMES, batches, criterion, seed).items()
        }


def moments_of(model, name):
    y = run_until(model, name, pictures(8), output=True).detach()
    sums = MomentSums(3)
    sums.add(neighbourhoods(y, 3), neighbourhoods(y, 1))
    return sums.moments()


@pytest.mark.parametrize(("criterion", "order"), [("l1", 1), ("l2", 2)])
def test_norms_are_those_of_the_filters(criterion, order):
    model = small()
    wanted = [torch.linalg.vector_norm(f, order) for f in model.conv2.weight.double()]
    torch.testing.assert_close(scores(criterion, model)["conv2"], torch.stack(wanted).detach())


def test_the_scale_is_that_of_the_batch_norm_which_reads_the_layer():
    model = small()
    with torch.no_grad():
        model.norm2.weight[3] = -7
    found = scores("bn_scale", model)
    torch.testing.assert_close(found["conv2"], model.norm2.weight.detach().double().abs())
    assert found["conv2"].argmax() == 3
    assert following_norms(model, pictures(2)) == {"conv1": "norm1", "conv2": "norm2"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: setattr(m, "norm2", nn.Identity()), "no batch norm reads its output"),
        (lambda m: setattr(m, "norm2", nn.BatchNorm2d(16, affine=False)), "has no scale"),
    ],
)
def test_without_a_scale_the_filters_decide_and_the_plan_says_so(change, why):
    model = small()
    change(model)
    ranking = rankings(model.eval(), NAMES, batches, "bn_scale", 0)
    assert ranking["conv1"].criterion == "bn_scale"
    assert ranking["conv2"].criterion.startswith("l2 (")
    assert why in ranking["conv2"].criterion
    assert torch.equal(ranking["conv2"].scores, scores("l2", model)["conv2"])
    _, plan = rebuild(model, pictures(), Compression(macs=0.4, criterion="bn_scale"))
    assert f"filters kept by l2 ({'' if why[0] == 'n' else 'its batch norm '}{why})" in (
        plan.layers["conv2"].reason
    )
    assert any("bn_scale in 1 layer, l2" in sentence for sentence in plan.explanation)


def test_taylor_is_the_change_of_the_loss_to_first_order_when_a_channel_is_scaled():
    model = small()
    found = scores("taylor", model)["conv1"]
    # Image by image: d loss / d gate of a gate behind the batch norm, at the label drawn.
    generator = torch.Generator().manual_seed(0)
    totals = torch.zeros(16, dtype=torch.double)
    for images in batches():
        predicted = (model(images) / TEMPERATURE).softmax(1)
        drawn = torch.multinomial(predicted, 1, generator=generator)[:, 0]
        for image, label in zip(images, drawn, strict=True):
            gate = torch.ones(16, requires_grad=True)

            def scale(_, __, output, gate=gate):
                return output * gate[:, None, None]

            handle = model.norm1.register_forward_hook(scale)
            logits = model(image[None])
            loss = TEMPERATURE * F.cross_entropy(logits / TEMPERATURE, label[None])
            handle.remove()
            totals += torch.autograd.grad(loss, gate)[0].double() ** 2
    torch.testing.assert_close(found, totals / 24, rtol=1e-3, atol=1e-9)


def test_a_channel_that_nobody_reads_does_not_matter_to_taylor():
    model = small()
    with torch.no_grad():
        model.conv2.weight[:, 5] = 0
    found = scores("taylor", model)["conv1"]
    assert found.argmin() == 5
    assert found[5] == 0


def test_random_orders_come_from_the_seed():
    assert torch.equal(scores("random", seed=1)["conv1"], scores("random", seed=1)["conv1"])
    assert not torch.equal(scores("random", seed=1)["conv1"], scores("random", seed=2)["conv1"])


def test_the_order_is_that_of_the_scores_or_of_reconstruction():
    model = small()
    moments, weights = moments_of(model, "conv2"), torch.rand(16, dtype=torch.double)
    ranked = rankings(model, NAMES, batches, "reconstruction", 0)["conv2"]
    assert ranked.order(moments, weights) == rank_channels(moments, weights)
    by_score = Ranking("l1", torch.tensor([1.0, 3.0, 2.0]))
    assert by_score.order(moments, weights) == [1, 2, 0]


@pytest.mark.parametrize("criterion", ["reconstruction", "l1"])
def test_a_ranking_can_be_restricted_to_some_channels(criterion):
    model = small()
    moments, weights = moments_of(model, "conv2"), torch.rand(16, dtype=torch.double)
    ranked = rankings(model, NAMES, batches, criterion, 0)["conv2"]
    among = [11, 2, 3, 7]
    order = ranked.restrict(among).order(moments, weights)
    assert sorted(order) == sorted(among)
    if criterion == "l1":
        assert order == [c for c in ranked.order(moments, weights) if c in among]


def test_an_unknown_criterion_is_refused_and_told_the_known():
    with pytest.raises(UserError, match=r"criterion = 'l3' must be one of reconstruction, l1, l2"):
        rankings(small(), NAMES, batches, "l3", 0)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_makes_a_student_within_the_budget_that_keeps_what_it_ranks_first(
    criterion,
):
    model = small()
    before = copy.deepcopy(model.state_dict())
    settings = Compression(macs=0.5, criterion=criterion)
    student, plan = rebuild(model, pictures(), settings, seed=3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert plan.criterion == criterion
    assert plan.macs_after <= 0.5 * plan.macs_before
    assert plan.explanation[1] == f"Criterion: {criterion}."
    converted = {name: layer for name, layer in plan.layers.items() if layer.kind == "sbf"}
    assert converted
    if criterion != "reconstruction":
        with torch.no_grad():
            # The others are held out.
            fitted, _ = split(calibration_for(model, pictures()))
            parts = lambda: fitted.parts(fitted.part)  # noqa: E731
            ranked = rankings(model, NAMES, parts, criterion, 3)
        for name, layer in converted.items():
            best = ranked[name].scores.argsort(descending=True).tolist()
            assert layer.kept == sorted(best[: len(layer.kept)])
            assert f"filters kept by {criterion}, " in layer.reason
    assert isinstance(student, Small)
