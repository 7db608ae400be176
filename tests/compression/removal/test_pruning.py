import copy
import gc
import itertools

import pytest
import torch
from batch_streams import Stream
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import pictures, small
from torch import nn

from sbf_dist import models
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.cost import count
from sbf_dist.compression.fitting.fidelity import Wanted
from sbf_dist.compression.fitting.statistics import measure_batch_norm
from sbf_dist.compression.removal.coupled import silence
from sbf_dist.compression.removal.importance import measure_importance
from sbf_dist.compression.removal.pruning import Removal, find_removable
from sbf_dist.compression.removal.pruning import remove as remove_by
from sbf_dist.errors import UserError
from sbf_dist.settings import Compression


def resnet(seed=0):
    torch.manual_seed(seed)
    model = models.build("cifar_resnet8", 5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.5)
    return model


def remove(removable, *, share, of="macs", **wanted):
    return remove_by(removable, Compression(**{of: 1.0}, **wanted), share)


@pytest.fixture(scope="module")
def removable():
    return find_removable(resnet(), pictures(48, 16))


@settings(deadline=None, max_examples=12)
@given(share=st.floats(0.1, 1.0), of=st.sampled_from(["macs", "params"]))
def test_the_share_is_met_within_one_channel_of_the_dearest_group(removable, share, of):
    removal = remove(removable, share=share, of=of, refit=False)
    before, after = removable.cost, count(removal.network, (3, 16, 16))
    assert removal.cost == after
    whole, left = getattr(before, of), getattr(after, of)
    assert left <= share * whole * (1 + 1e-6)
    # No step is larger than one channel of the first group on the dense network.
    assert left >= share * whole - 0.09 * whole


@pytest.mark.parametrize(
    "criterion", ["reconstruction", "fisher", "taylor", "l1", "l2", "bn_scale"]
)
def test_every_criterion_gives_a_network_that_works(criterion):
    model = resnet()
    found = find_removable(model, pictures(32, 16), criterion=criterion)
    removal = remove(found, share=0.5)
    assert removal.network(pictures(3, 16)).shape == (3, 5)
    assert removal.removed
    assert removal.left == {"head": "nothing but the network's output reads it"}


def test_channels_that_do_nothing_are_removed_first_and_for_nothing():
    model = small()
    idle = [1, 4, 6, 11]
    with torch.no_grad():
        model.conv2.weight[:, idle] = 0
    images = pictures(64)
    measure_batch_norm(model, images, 64)
    macs = count(model, (3, 10, 10)).macs
    saving = len(idle) * (100 * model.conv1.weight[0].numel() + 25 * 16 * 9)
    removal = remove(find_removable(model, images), share=1 - saving / macs)
    assert removal.cost.macs == macs - saving
    assert removal.removed["conv1"].out == idle
    torch.testing.assert_close(removal.network(images), model(images), atol=1e-3, rtol=1e-3)


def test_without_batch_norm_the_narrowed_network_is_the_silenced_one_but_for_the_means():
    model = small(norm=False)
    removal = remove(find_removable(model, pictures(64)), share=0.6, refit=False)
    silenced = copy.deepcopy(model)
    silence(silenced, removal.removed)
    gone = {name: set(cut.out) for name, cut in removal.removed.items()}
    biases = {
        name: [c for c in range(len(silenced.get_submodule(name).bias)) if c not in gone[name]]
        for name in ("conv2", "head")
        if name in gone
    }
    with torch.no_grad():
        for name, left in biases.items():
            silenced.get_submodule(name).bias[left] = removal.network.get_submodule(name).bias
        x = pictures(4)
        torch.testing.assert_close(removal.network(x), silenced(x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model.head.bias, removal.network.head.bias)


def test_importance_by_fisher_is_the_divergence_that_is_measured():
    model = small()
    images = pictures(256)
    found = find_removable(model, images)
    group = next(g for g in found.groups if g.name == "conv2")
    (scores,) = measure_importance(found.dense, [group], found.images, "fisher")
    with torch.no_grad():
        wanted = model(images).log_softmax(1)
        measured = []
        means = []
        handle = model.head.register_forward_pre_hook(lambda _, x: means.append(x[0].mean(0)))
        model(images)
        handle.remove()
        for channel in range(16):
            trial = copy.deepcopy(model)
            trial.head.bias += trial.head.weight[:, channel] * means[0][channel]
            trial.head.weight[:, channel] = 0
            made = trial(images).log_softmax(1)
            measured.append(float((wanted.exp() * (wanted - made)).sum(1).mean()))
    correlation = torch.corrcoef(torch.stack([scores, torch.tensor(measured).double()]).log())
    assert correlation[0, 1] > 0.9


def test_nothing_goes_below_its_floor_and_what_is_left_is_a_multiple():
    found = find_removable(resnet(), pictures(32, 16))
    removal = remove(found, share=0.4, floor=0.5, round_to=4)
    for name, module in removal.network.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels % 4 == 0
            dense = models.build("cifar_resnet8", 5).get_submodule(name)
            assert module.out_channels >= 0.5 * dense.out_channels


def test_layers_that_are_to_be_kept_are_left_whole():
    model = resnet()
    found = find_removable(model, pictures(32, 16), keep=("stages.2.*", "conv"))
    removal = remove(found, share=0.7)
    assert "kept whole, as 'conv' asks" in removal.left.values()
    for name, cut in removal.removed.items():
        assert not (cut.out and (name.startswith("stages.2.") or name == "conv")), name


def test_a_share_that_floors_forbid_is_refused_with_the_smallest_that_works():
    found = find_removable(resnet(), pictures(16, 16))
    with pytest.raises(
        UserError, match=r"0.05 of the macs cannot be reached; .* leaves 0\.\d+"
    ) as e:
        remove(found, share=0.05, floor=0.5)
    smallest = float(str(e.value).rsplit(" ", 1)[1])
    assert remove(found, share=smallest, floor=0.5).cost.macs <= smallest * found.cost.macs
    for share in (0.0, -1.0, 1.5):
        with pytest.raises(UserError, match=r"must lie in \(0, 1\]"):
            remove(found, share=share)


def test_a_network_that_cannot_be_followed_is_refused_with_the_reason():
    model = models.build("torchvision:shufflenet_v2_x0_5", 5)
    found = find_removable(model, pictures(4, 32))
    with pytest.raises(
        UserError, match="no channel can be removed: torch-pruning cannot follow"
    ) as e:
        remove(found, share=0.5)
    assert str(e.value).endswith("; removal = 0 rebuilds channels alone")


def test_a_network_of_which_every_layer_must_stay_is_refused_with_all_reasons():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 3, groups=2)),
        *(nn.Conv2d(8, 8, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    ).eval()
    with pytest.raises(UserError, match="no channel can be removed from its 4 layers; ") as e:
        remove(find_removable(model, pictures(8, 16)), share=0.5)
    assert "2 of them: it is a grouped convolution (2 groups)" in str(e.value)
    assert "1 of them: its channels reach 1, a GroupNorm of 4 groups" in str(e.value)
    assert "1 of them: nothing but the network's output reads it" in str(e.value)


def test_what_remains_is_told_by_the_dense_networks_numbers():
    model = resnet()
    removal = remove(find_removable(model, pictures(32, 16)), share=0.5, refit=False)
    assert isinstance(removal, Removal)
    remaining = removal.remaining(model)
    for name, left in remaining.items():
        conv, narrow = model.get_submodule(name), removal.network.get_submodule(name)
        assert len(narrow.weight) == len(left)
        if isinstance(conv, nn.BatchNorm2d):
            assert torch.equal(narrow.weight, conv.weight[left])
            continue
        cut = removal.removed[name].inp
        inputs = [c for c in range(conv.weight.shape[1]) if c not in cut]
        assert torch.equal(narrow.weight, conv.weight[left][:, inputs])


def test_the_same_seed_removes_the_same_and_the_model_stays():
    model = resnet()
    before = copy.deepcopy(model.state_dict())
    one, other = (remove(find_removable(model, pictures(16, 16)), share=0.5) for _ in range(2))
    assert one.removed == other.removed
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    for module in itertools.chain(model.modules(), one.network.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_pattern_of_layers_to_keep_that_matches_nothing_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"'stage.0.\*' matches no convolution; did you mean 's"):
        find_removable(resnet(), pictures(8, 16), keep=("stage.0.*",))


def test_a_pattern_may_name_a_linear_layer_alone():
    keep = ("head",)
    assert find_removable(small(), pictures(8), keep=keep).groups


@pytest.mark.parametrize("criterion", ["fisher", "taylor"])
def test_a_batch_and_its_graph_are_gone_when_the_next_comes(criterion):
    found = find_removable(small(), pictures(8, 4))
    stream = Stream([4] * 6)
    images = Calibration.of(stream)
    gc.disable()  # which frees what is held in a circle some time later, if it can
    try:
        stream.most = stream.alive
        measure_importance(found.dense, found.groups, images, criterion)
        assert stream.most <= 2
        assert stream.alive == 0
    finally:
        gc.enable()


def test_weights_alone_are_judged_as_a_share_of_the_groups_mean():
    found = find_removable(resnet(), pictures(8, 16), criterion="l1")
    for scores in measure_importance(found.dense, found.groups, found.images, "l1"):
        assert float(scores.detach().mean()) == pytest.approx(1)
    conv1 = next(g for g in found.groups if g.name == "stages.0.0.conv1")
    (scores,) = measure_importance(found.dense, [conv1], found.images, "l1")
    block = found.dense.stages[0][0]
    summed = block.conv1.weight.abs().sum((1, 2, 3)) + block.conv2.weight.abs().sum((0, 2, 3))
    torch.testing.assert_close(scores, (summed / summed.mean()).double(), rtol=1e-5, atol=0)


def test_solving_the_filters_anew_brings_the_narrowed_network_nearer_to_the_dense_one():
    model, images = small(), pictures(128)
    found = find_removable(model, images)
    fresh = pictures(192)[128:]
    with torch.no_grad():
        wanted = model(fresh)
    plain, refitted = (remove(found, share=0.5, refit=refit) for refit in (False, True))
    assert plain.removed == refitted.removed
    kl = [Wanted([wanted]).compare([r.network(fresh)]).divergence for r in (plain, refitted)]
    assert kl[1] < kl[0]
