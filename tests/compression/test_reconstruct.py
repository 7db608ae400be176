import copy
import re

import pytest
import torch
from rebuilt_networks import divergence, shrink
from small_networks import Small, pictures, small
from torch import nn

from sbf_dist import models
from sbf_dist.compression import candidates
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.candidates import forward_order
from sbf_dist.compression.convert import convert
from sbf_dist.compression.cost import count
from sbf_dist.compression.fitting import refit
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.statistics import measure_batch_norm, run_until
from sbf_dist.compression.holding_out import split
from sbf_dist.compression.plan import Plan, SBFLayer
from sbf_dist.compression.planning import option_table
from sbf_dist.compression.prepared_images import calibration_for
from sbf_dist.compression.removal.zeroed import zero_channels
from sbf_dist.errors import UserError
from sbf_dist.layers import SBFConv2d


@pytest.mark.parametrize("macs", [0.35, 0.6, 0.95])
def test_the_student_costs_what_its_plan_says_and_no_more_than_was_asked(macs):
    model = small()
    student, plan = shrink(model, macs=macs)
    before, after = (count(network, (3, 10, 10)) for network in (model, student))
    assert (plan.macs_before, plan.params_before) == (before.macs, before.params)
    assert (plan.macs_after, plan.params_after) == (after.macs, after.params)
    assert after.macs <= macs * before.macs * (1 + 1e-6)
    for name, layer in plan.layers.items():
        spent = layer.macs_after if isinstance(layer, SBFLayer) else layer.macs
        assert after.layers[name] == spent
    assert plan.budget == {"macs": macs}
    assert not student.training


def test_layers_are_in_forward_order_with_a_reason_each():
    _, plan = shrink(models.build("cifar_resnet8", 5).eval(), macs=0.4)
    assert list(plan.layers)[:3] == ["conv", "stages.0.0.conv1", "stages.0.0.conv2"]
    assert plan.layers["conv"].reason == "the stem: it reads the image itself"
    assert len(plan.layers) == 9
    assert all(layer.reason for layer in plan.layers.values())


def test_plan_and_weights_make_the_very_student():
    student, plan = shrink(small())
    again = convert(Small(), Plan.model_validate_json(plan.model_dump_json())).eval()
    again.load_state_dict(student.state_dict())
    x = pictures(4)
    assert torch.equal(again(x), student(x))


def test_the_model_is_left_as_it_was():
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    shrink(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_before_the_first_change_stay_as_they_are():
    torch.manual_seed(1)
    model = models.build("cifar_resnet14", 5).eval()
    student, plan = shrink(model, pictures(32, 16), macs=0.93)
    order = list(plan.layers)
    first = next(i for i, name in enumerate(order) if isinstance(plan.layers[name], SBFLayer))
    stay = [name for name in order[:first] if plan.layers[name].convertible]
    assert len(stay) >= 3
    for name in stay:
        before, after = (network.get_submodule(name).weight for network in (model, student))
        assert torch.equal(before, after), name


def test_the_same_seed_gives_the_same_student():
    (one, plan), (other, same) = shrink(small(), seed=3), shrink(small(), seed=3)
    assert plan.digest() == same.digest()
    x = pictures(3)
    assert torch.equal(one(x), other(x))


def test_layers_that_mix_their_basis_have_the_errors_that_are_measured():
    model, images = small(norm=False), pictures(48)
    student, plan = shrink(model, images, macs=0.4)
    made_of = {n: layer for n, layer in plan.layers.items() if isinstance(layer, SBFLayer)}
    mixed = {name: all(row == m.kept for row in m.sources) for name, m in made_of.items()}
    assert any(mixed.values())
    fitted, _ = split(calibration_for(model, images))
    images = fitted.first(fitted.count)
    for name, layer in made_of.items():
        wanted = run_until(model, name, images, output=True)
        made = run_until(student, name, images, output=True)
        variance = wanted.transpose(0, 1).flatten(1).var(1, correction=0).sum()
        measured = (wanted - made).square().mean((0, 2, 3)).sum() / variance
        assert layer.error == pytest.approx(measured.item(), rel=1e-3, abs=1e-4)


def copies(kernels):
    """A network whose convolutions can be rebuilt from a quarter of their channels without loss.

    Channel c of a layer is channel c % 4 filtered by kernels[c // 4]: the first four filters have
    nothing but a centre, so that also the zeros at the border agree.
    """
    model = small(norm=False)
    # SBF filters what a convolution of stride 2 has left, a copy here what was before.
    model.conv2 = nn.Conv2d(16, 16, 3, padding=1)
    with torch.no_grad():
        for conv in (model.conv1, model.conv2):
            points = torch.randn(4, conv.in_channels)
            filters = [points[:, :, None, None] * kernel for kernel in kernels]
            # Small, so that the predictions are not all certain and every channel matters.
            conv.weight.copy_(0.1 * torch.cat(filters))
    return model


def test_channels_that_are_filtered_copies_are_rebuilt_without_loss():
    delta = torch.zeros(3, 3)
    delta[1, 1] = 1
    kernels = [4 * delta, *torch.randn(3, 3, 3)]
    model = copies(kernels)
    images = pictures(64)
    student, plan = shrink(model, images, macs=0.5, sources=1)
    for name in ("conv1", "conv2"):
        layer = plan.layers[name]
        assert isinstance(layer, SBFLayer)
        assert set(layer.kept) >= {0, 1, 2, 3}
        assert layer.error < 1e-5
        wanted = run_until(model, name, images, output=True)
        rebuilt = run_until(student, name, images, output=True)
        torch.testing.assert_close(rebuilt, wanted, rtol=0, atol=0.02 * wanted.std().item())
    assert divergence(model, student, images) < 1e-5


def test_the_error_of_each_layer_is_what_is_measured_on_the_converted_network():
    model = small(norm=False)
    images = pictures(48)
    student, plan = shrink(model, images, macs=0.35)
    converted = [name for name, layer in plan.layers.items() if layer.kind == "sbf"]
    assert converted == ["conv1", "conv2"]
    fitted, _ = split(calibration_for(model, images))
    images = fitted.first(fitted.count)
    for name in converted:
        wanted = run_until(model, name, images, output=True)
        made = run_until(student, name, images, output=True)
        variance = wanted.transpose(0, 1).flatten(1).var(1, correction=0).sum()
        measured = (wanted - made).square().mean((0, 2, 3)).sum() / variance
        assert plan.layers[name].error == pytest.approx(measured.item(), rel=1e-3, abs=1e-5)
        # Means are exact, of kept channels too.
        assert (wanted - made).mean((0, 2, 3)).abs().max() < 1e-4 * wanted.abs().max()


def redundant(**settings):
    """A network whose filters are, but for a little, sums of four of their layer's."""
    model = small(**settings)
    with torch.no_grad():
        for conv in (model.conv1, model.conv2):
            mixed = torch.einsum("ck,kiab->ciab", torch.randn(16, 4), conv.weight[:4])
            conv.weight.copy_(0.5 * mixed + 0.05 * conv.weight)
    measure_batch_norm(model, pictures(64), 64)
    return model


def test_more_sources_leave_a_smaller_error():
    model, images = redundant(norm=False), pictures(48)
    errors = []
    for sources in (1, 4):
        _, plan = shrink(model, images, macs=0.7, sources=sources, mixtures=False)
        used = {len(layer.sources[0]) for layer in plan.layers.values() if layer.kind == "sbf"}
        assert max(used) <= sources
        errors.append(sum(layer.error for layer in plan.layers.values() if layer.kind == "sbf"))
    assert errors[1] < 0.5 * errors[0]


def test_rebuilding_is_nearer_to_the_dense_network_than_zeroing_at_the_same_cost():
    model, images = redundant(), pictures(64)
    student, plan = shrink(model, images, macs=0.6)
    zeroed, macs, _ = zero_channels(
        model, ["conv1", "conv2"], images, plan.macs_after / plan.macs_before
    )
    assert macs <= plan.macs_after
    assert divergence(model, student, images) < 0.1 * divergence(model, zeroed, images)


class Mixed(nn.Module):
    """All that is left dense, and two that can be converted, one of which never runs."""

    def __init__(self):
        super().__init__()
        self.aside = nn.Conv2d(16, 16, 3)
        self.stem = nn.Conv2d(3, 16, 3)
        own_forward = {"forward": lambda self, x: nn.Conv2d.forward(self, 1 * x).relu()}
        self.special = type("Special", (nn.Conv2d,), own_forward)(16, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.narrow = nn.Conv2d(16, 1, 1)
        self.cheap = nn.Conv2d(1, 16, 1)
        self.one = nn.Conv2d(16, 1, 3, padding=1)
        self.plain = nn.Conv2d(16, 32, 3, padding=1)

    def forward(self, x):
        x = self.depthwise(self.special(self.stem(x)[..., :5, :5]))
        x = self.cheap(self.narrow(x))
        return self.plain(x * self.one(x).sigmoid()).mean((2, 3))


def test_what_cannot_be_converted_stays_dense_and_says_why():
    torch.manual_seed(0)
    _, plan = shrink(Mixed().eval(), macs=0.8)
    reasons = {name: layer.reason for name, layer in plan.layers.items() if layer.kind == "dense"}
    assert reasons["stem"] == "the stem: it reads the image itself"
    assert reasons["special"].startswith("Special computes something else than zero padding")
    assert reasons["depthwise"].startswith("depthwise convolution: ")
    assert reasons["cheap"] == "a filter costs 1 multiply-adds, rebuilding a channel at least 1"
    assert reasons["aside"] == "no forward pass in evaluation mode reaches it"
    assert "one" in reasons, "a single channel leaves nothing to rebuild"
    assert plan.layers["plain"].kind == "sbf"
    for name in ("stem", "special", "depthwise", "cheap", "aside"):
        assert not plan.layers[name].convertible
    # The plan knows every convolution, so that it can be applied.
    student = convert(Mixed(), plan)
    assert isinstance(student.plain, SBFConv2d)


def test_floor_is_the_least_share_that_is_kept():
    with pytest.raises(UserError):
        shrink(small(), macs=0.5, floor=0.75)
    _, plan = shrink(small(), macs=0.85, floor=0.75)
    converted = [layer for layer in plan.layers.values() if layer.kind == "sbf"]
    assert converted
    assert all(len(layer.kept) >= 12 for layer in converted)


def test_a_floor_of_everything_leaves_nothing_to_choose():
    with pytest.raises(UserError, match=r"smallest that works is 1$"):
        shrink(small(), macs=0.9, floor=1.0)


def test_a_budget_that_is_too_small_names_the_smallest_share_and_that_works():
    with pytest.raises(UserError, match=r"macs = 0\.01 of the dense network") as told:
        shrink(small(), macs=0.01)
    smallest = float(re.search(r"smallest that works is (\S+)$", str(told.value))[1])
    assert 0.01 < smallest < 0.5
    _, plan = shrink(small(), macs=smallest)
    assert plan.macs_after <= smallest * plan.macs_before * (1 + 1e-6)
    with pytest.raises(UserError):
        shrink(small(), macs=smallest - 0.001)


def test_a_network_without_convertible_convolutions_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UserError, match="'small' has no convolution that an SBF layer could"):
        shrink(model)


@pytest.mark.parametrize(
    ("value", "where", "message"),
    [
        (float("nan"), "conv2.weight", "'small' has NaN in layer conv2 (weight)"),
        (float("inf"), "norm1.running_var", "'small' has infinity in layer norm1 (running_var)"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(value, where, message):
    model = small()
    model.state_dict()[where].view(-1)[3] = value
    with pytest.raises(UserError, match=re.escape(message)):
        shrink(model)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.again = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1)
        self.once = nn.Conv2d(16, 16, 3)

    def forward(self, x):
        return self.once(self.again(self.again(self.stem(x)))).mean((2, 3))


def test_a_layer_that_runs_twice_stays_dense_and_the_others_do_not():
    student, plan = shrink(Twice().eval(), macs=0.95)
    assert plan.layers["again"].reason.startswith("used 2 times in a forward pass")
    assert plan.layers["once"].kind == "sbf"
    assert type(student.again) is nn.Conv2d


def test_forward_order_is_that_of_running_not_of_definition():
    assert forward_order(Mixed(), pictures(2)) == [
        "stem", "special", "depthwise", "narrow", "cheap", "one", "plain",
    ]  # fmt: skip


def test_dead_and_constant_channels_do_no_harm():
    model = small(norm=False)
    with torch.no_grad():
        model.conv1.weight[3] = 0
        model.stem.weight[2] = 0  # a constant input
        model.stem.bias[2] = 0.7
    student, plan = shrink(model, macs=0.5)
    assert all(parameter.isfinite().all() for parameter in student.parameters())
    assert divergence(model, student, pictures()) < 0.5
    assert 0 < plan.layers["conv1"].error < 1


def test_progress_goes_up_to_the_end_of_each_part():
    told = []
    shrink(small(), progress=lambda *record: told.append(record))
    assert [record for record in told if record[0] == "measure layers"] == [
        ("measure layers", 1, 2),
        ("measure layers", 2, 2),
    ]
    assert [record for record in told if record[0] == "fit layers"] == [
        ("fit layers", done, 3) for done in (1, 2, 3)
    ]


def test_a_layer_that_is_too_wide_for_shifts_gets_transformations_of_size_one(monkeypatch):
    monkeypatch.setattr(candidates, "LARGEST_GRAM", 9 * 31)
    _, plan = shrink(models.build("cifar_resnet8", 5).eval(), macs=0.4, mixtures=False)
    sizes = {
        (layer.channels, layer.transform_size)
        for layer in plan.layers.values()
        if isinstance(layer, SBFLayer)
    }
    assert (16, 3) in sizes
    assert {size for channels, size in sizes if channels > 16} == {1}


# --- calibration images and references ---------------------------------------------------------


def test_a_stream_of_batches_gives_the_same_network_as_a_tensor():
    model, images = small(), pictures(40)
    one, plan = shrink(model, images)
    other, same_plan = shrink(model, Calibration.of(list(images.split(64))))
    assert plan == same_plan
    for key, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_filters_solved_anew_bring_the_predictions_nearer():
    model, images = redundant(), pictures(64)
    plain, plan = shrink(model, images, macs=0.4, refit=False)
    mended, same = shrink(model, images, macs=0.4, mixtures=False)
    assert same.macs_after == plan.macs_after
    unseen = pictures(200)[64:]
    assert divergence(model, mended, unseen) < 0.9 * divergence(model, plain, unseen)
    assert torch.equal(plain.head.weight, model.head.weight)


def test_what_inputs_varied_by_in_training_is_measured_once_for_all_layers(monkeypatch):
    asked, own = [], option_table.prior_variances

    def measure(model, names, images):
        asked.append(names)
        return own(model, names, images)

    for module in (option_table, refit):
        monkeypatch.setattr(module, "prior_variances", measure)
    _, plan = shrink(small())
    assert any("Linear layers solved anew" in line for line in plan.explanation)
    assert asked == [["conv1", "conv2", "head"]]


def test_without_refit_kept_filters_are_the_dense_networks_own():
    model = small()
    student, plan = shrink(model, macs=0.5, refit=False)
    kept = plan.layers["conv2"].kept
    assert torch.equal(student.conv2.basis.weight, model.conv2.weight[kept])


def test_a_network_is_fitted_to_its_reference():
    """The reference's logits are twice the network's own: so are then the student's."""
    model, images = small(), pictures(64)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.head.weight.mul_(2)
        reference.head.bias.mul_(2)
    student, _ = shrink(model, images, macs=0.7, reference=Reference(reference))
    with torch.no_grad():
        made, wanted, own = student(images), reference(images), model(images)
    assert (made - wanted).square().mean() < 0.3 * (made - own).square().mean()
