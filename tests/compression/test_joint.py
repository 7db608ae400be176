import copy

import pytest
import torch
from small_networks import Silent, Small, pictures, small
from torch import nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.convert import convert
from sbf_dist.compression.cost import count
from sbf_dist.compression.fitting.fidelity import OutputsFor, Wanted
from sbf_dist.compression.joint import SHARES, JointPlanner, plan_jointly
from sbf_dist.compression.plan import Plan, SBFLayer
from sbf_dist.compression.reconstruct import rebuild
from sbf_dist.compression.removal.probe import Probe, train_briefly
from sbf_dist.compression.removal.pruning import find_removable
from sbf_dist.errors import UserError
from sbf_dist.layers import SBFConv2d
from sbf_dist.settings import Compression


def jointly(model, images=None, macs=0.5, shares=(0,), keep_training=False, **settings):
    chosen = planner(model, images, macs, **settings)
    return chosen.best(shares, keep_training=keep_training)


def planner(model, images=None, macs=0.5, probe=None, **settings):
    images = pictures(80) if images is None else images
    wanted = Compression(macs=macs, **settings)
    return JointPlanner(model, images, wanted, probe=probe, name="small")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_each_share_meets_the_budget_and_plan_and_weights_make_the_student_again(share):
    model = small()
    student, plan = jointly(model, shares=(share,))
    dense, after = (count(network, (3, 10, 10)) for network in (model, student))
    assert (plan.macs_before, plan.macs_after) == (dense.macs, after.macs)
    assert (plan.params_before, plan.params_after) == (dense.params, after.params)
    assert after.macs <= 0.5 * dense.macs * (1 + 1e-6)
    assert bool(plan.removed) == (share > 0)
    assert any(isinstance(layer, SBFLayer) for layer in plan.layers.values()) == (share < 1)
    again = convert(Small(), Plan.model_validate_json(plan.model_dump_json())).eval()
    again.load_state_dict(student.state_dict())
    x = pictures(4)
    assert torch.equal(again(x), student(x))
    assert not student.training


def test_rebuilding_alone_is_what_compress_makes_of_the_same_images():
    model, images = small(), pictures(80)
    student, plan = jointly(model, images, shares=(0,))
    alone, same = rebuild(model, images, Compression(macs=0.5), name="small")
    assert plan.layers == same.layers
    assert torch.equal(student(images), alone(images))


def test_the_best_by_its_own_measure_is_chosen_and_the_table_is_in_the_plan():
    model = small()
    each = planner(model)
    candidates = [each.candidate(share) for share in (0, 0.5, 1)]
    best = min(candidates, key=lambda candidate: candidate.divergence)
    student, plan = jointly(model, shares=(0, 0.5, 1))
    x = pictures(4)
    assert torch.equal(student(x), best.student(x))
    assert plan.removed == best.plan.removed
    assert plan.explanation[0].startswith(f"share {best.share:g} of the saving comes from removing")
    for candidate, sentence in zip(candidates, plan.explanation[1:4], strict=True):
        assert sentence.startswith(f"share {candidate.share:g} by removal: ")
        assert f"KL {candidate.fitted_divergence:.5f} as fitted" in sentence


def test_a_probe_trains_a_copy_and_is_what_candidates_are_compared_by():
    model = small()
    candidate = planner(model, probe=Probe(steps=40)).candidate(0.5)
    untouched = planner(model).candidate(0.5)
    x = pictures(4)
    assert torch.equal(candidate.student(x), untouched.student(x))
    assert candidate.fitted_divergence == untouched.divergence
    assert candidate.divergence != candidate.fitted_divergence
    settings = {"shares": (0.5,), "probe": Probe(steps=40)}
    assert torch.equal(jointly(model, **settings)[0](x), untouched.student(x))
    trained, plan = jointly(model, **settings, keep_training=True)
    assert torch.equal(trained(x), candidate.trained(x))
    assert f"{candidate.divergence:.5f} after 40 steps" in plan.explanation[1]


def test_a_probe_gives_the_same_twice_and_brings_a_student_nearer_to_its_teacher():
    dense, student = small(seed=1), small(seed=2)
    images = Calibration.of(pictures(64), batch=24)
    before = copy.deepcopy(student.state_dict())
    one, other = (
        train_briefly(dense, student, images, Probe(steps=15, flip=True), seed=4) for _ in range(2)
    )
    with torch.no_grad():
        assert torch.equal(one(pictures(2)), other(pictures(2)))
    wanted = Wanted.of(dense, images)
    found = [wanted.compare(OutputsFor(net, images)).divergence for net in (one, student, dense)]
    assert found[0] < found[1]
    assert found[2] == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in before.items())


def removing_but(keep):
    """A planner that may not remove channels of these layers, though it may rebuild them."""
    model = small()
    each = planner(model)
    each.__dict__["_removable"] = find_removable(model, each.images, keep=tuple(keep))
    return each


def test_a_share_that_cannot_be_reached_is_told_in_the_table_and_another_is_taken():
    _, plan = removing_but(["stem", "conv1"]).best((0, 1))
    assert plan.removed == {}
    assert "share 1 by removal: impossible, removal: 0.5 of the macs" in plan.explanation[2]
    with pytest.raises(UserError, match=r"removal: 0\.5 of the macs cannot be reached"):
        removing_but(["stem", "conv1"]).best((1,))


def test_a_network_of_which_nothing_can_be_removed_is_rebuilt():
    _, plan = removing_but(["*"]).best((0, 0.5))
    assert plan.removed == {}
    assert "share 0.5 by removal: impossible, removal: no channel can be" in plan.explanation[2]


def test_without_refit_what_removal_leaves_are_the_networks_own_filters():
    model = small()
    student, plan = jointly(model, shares=(1,), refit=False)
    solved, _ = jointly(model, shares=(1,))
    left = sorted(set(range(16)) - set(plan.removed["conv2"].out))
    inputs = sorted(set(range(16)) - set(plan.removed["conv2"].inp))
    own = model.conv2.weight[left][:, inputs]
    assert torch.equal(student.conv2.weight, own)
    assert not torch.equal(solved.conv2.weight, own)


def test_layers_to_be_kept_are_not_narrowed():
    _, plan = jointly(small(), macs=0.7, shares=(1,), keep=["conv1"])
    assert "conv1" not in plan.removed or not plan.removed["conv1"].out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": ()}, r"removal: shares = \[\] must be numbers in \[0, 1\]"),
        ({"shares": (0, 1.5)}, r"removal: shares = \[0, 1\.5\] must be numbers"),
        (
            {"images": pictures(4), "shares": (0, 1), "removal": "auto"},
            "removal = 'auto': of 4 calibration images none can be held out",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        jointly(small(), **settings)


def test_the_settings_say_which_shares_are_tried_and_how_long_the_probe_is():
    model, images = small(), pictures(80)
    _, plan = plan_jointly(model, images, Compression(macs=0.5, removal=1))
    assert plan.explanation[0].startswith("share 1 of the saving comes from removing channels")
    assert plan.explanation[1].endswith(" as fitted")
    settings = Compression(macs=0.5, removal="auto", probe_steps=3)
    _, plan = plan_jointly(model, images, settings)
    tried = [row for row in plan.explanation if " by removal: " in row]
    assert len(tried) == len(SHARES)
    assert all(row.endswith(" after 3 steps") for row in tried)


def test_a_budget_of_time_is_refused():
    with pytest.raises(UserError, match=r"budget latency = 0\.5: channels can be removed to"):
        plan_jointly(small(), pictures(16), Compression(latency=0.5))


def test_sbf_layers_are_fitted_to_the_dense_networks_channels_that_are_left():
    model = small(norm=False)
    student, plan = jointly(model, shares=(0.5,), macs=0.4)
    converted = [n for n, layer in plan.layers.items() if isinstance(layer, SBFLayer)]
    assert converted
    x = pictures(16)
    for name in converted:
        seen = {}
        for key, network in (("dense", model), ("student", student)):
            module = network.get_submodule(name)
            handle = module.register_forward_hook(
                lambda _, __, out, key=key, seen=seen: seen.__setitem__(key, out)
            )
            with torch.no_grad():
                network(x)
            handle.remove()
        gone = plan.removed[name].out if name in plan.removed else []
        left = [c for c in range(seen["dense"].shape[1]) if c not in gone]
        assert isinstance(student.get_submodule(name), SBFConv2d)
        wanted = seen["dense"][:, left]
        error = (seen["student"] - wanted).square().mean() / wanted.var()
        assert error < 0.5, name


class Classifier(nn.Module):
    """Two linear layers behind the convolutions, as VGG has."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.hidden = nn.Linear(12 * 16, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        return self.head(self.hidden(x.flatten(1)).relu())


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_linear_layers_are_narrowed_too_and_a_budget_of_parameters_is_met(share):
    torch.manual_seed(0)
    model = Classifier().eval()
    _, plan = plan_jointly(model, pictures(80, 8), Compression(params=0.8, removal=share))
    assert plan.removed["hidden"].out
    assert plan.params_after <= 0.8 * plan.params_before


def test_candidates_are_compared_on_images_of_other_sources():
    images = pictures(80)
    images[:, 0, 0, 0] = torch.arange(80.0)  # by which they are recognised
    joint = planner(small(), Calibration.of(images, sources=[number % 10 for number in range(80)]))
    held = {int(x[0, 0, 0]) % 10 for batch in joint.held for x in batch}
    rest = {int(x[0, 0, 0]) % 10 for batch in joint.fitted for x in batch}
    assert held
    assert rest
    assert not held & rest


def test_one_share_needs_no_images_to_compare_on():
    _, plan = plan_jointly(small(), pictures(4), Compression(macs=0.7, removal=1.0))
    assert plan.removed
    assert plan.macs_after <= 0.7 * plan.macs_before
    assert "held out" not in plan.explanation[0]


def test_a_network_whose_train_returns_nothing_is_compressed():
    student, plan = plan_jointly(
        Silent(small()), pictures(80), Compression(macs=0.5, removal="auto", probe_steps=2)
    )
    assert not student.training
    assert plan.macs_after <= 0.5 * plan.macs_before * (1 + 1e-6)
