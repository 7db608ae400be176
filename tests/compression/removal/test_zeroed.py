import pytest
import torch
from small_networks import Silent, Small, pictures, small
from torch import nn

from sbf_dist import models
from sbf_dist.compression.cost import count
from sbf_dist.compression.removal.zeroed import effective_cost, zero_channels


def cut(zeroed):
    """The network without the channels that are zero: really smaller, built by hand."""
    first = zeroed.conv1.weight.flatten(1).any(1)
    second = zeroed.conv2.weight.flatten(1).any(1)
    pruned = Small()
    pruned.stem = zeroed.stem
    for conv, norm, kept, read in (
        ("conv1", "norm1", first, slice(None)),
        ("conv2", "norm2", second, first),
    ):
        old = zeroed.get_submodule(conv)
        new = nn.Conv2d(old.weight[:, read].shape[1], int(kept.sum()), 3, old.stride, 1, bias=False)
        new.weight = nn.Parameter(old.weight[kept][:, read])
        setattr(pruned, conv, new)
        smaller = nn.BatchNorm2d(int(kept.sum()))
        smaller.load_state_dict(
            {
                name: value[kept] if value.ndim else value
                for name, value in zeroed.get_submodule(norm).state_dict().items()
            }
        )
        setattr(pruned, norm, smaller)
    pruned.head = nn.Linear(int(second.sum()), 5)
    pruned.head.weight = nn.Parameter(zeroed.head.weight[:, second])
    pruned.head.bias = zeroed.head.bias
    return pruned.eval()


@pytest.mark.parametrize("macs", [0.25, 0.6])
def test_the_network_is_worth_what_it_is_when_pruned(macs):
    images = pictures(40)
    zeroed, counted, params = zero_channels(small(), ["conv1", "conv2"], images, macs)
    pruned = cut(zeroed)
    assert pruned.conv1.out_channels == pruned.conv2.out_channels < 16
    torch.testing.assert_close(pruned(images), zeroed(images))
    cost = count(pruned, (3, 10, 10))
    assert counted == cost.macs
    assert params == cost.params


@pytest.mark.parametrize("macs", [0.2, 0.5, 0.9])
def test_the_budget_is_met_and_one_channel_more_would_exceed_it(macs):
    model, images = small(), pictures()
    zeroed, counted, _ = zero_channels(model, ["conv1", "conv2"], images, macs)
    kept = int(zeroed.conv1.weight.flatten(1).any(1).sum())
    stem, head = 100 * 8 * 27, 5

    def cost(channels):
        return stem + 100 * channels * 72 + 25 * channels**2 * 9 + channels * head

    budget = macs * cost(16)
    assert counted == cost(kept) <= budget < cost(kept + 1)


def test_the_smallest_filters_go():
    model, images = small(), pictures()
    zeroed, *_ = zero_channels(model, ["conv1", "conv2"], images, 0.5)
    size = model.conv1.weight.abs().sum((1, 2, 3))
    kept = zeroed.conv1.weight.flatten(1).any(1)
    assert size[kept].min() > size[~kept].max()
    assert torch.equal(zeroed.conv1.weight[kept], model.conv1.weight[kept])
    # Behind its batch norm a removed channel is silent too.
    assert zeroed.norm1(zeroed.conv1(zeroed.stem(images)))[:, ~kept].abs().max() == 0


def test_the_whole_budget_removes_nothing_and_the_model_is_not_touched():
    model, images = small(), pictures()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    zeroed, counted, params = zero_channels(model, ["conv1", "conv2"], images, 1.0)
    cost = count(model, (3, 10, 10))
    assert (counted, params) == (cost.macs, cost.params)
    assert torch.equal(zeroed.conv1.weight, model.conv1.weight)
    zero_channels(model, ["conv1", "conv2"], images, 0.3)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_batch_norm_is_measured_again_behind_what_was_zeroed():
    images = pictures()
    zeroed, *_ = zero_channels(small(), ["conv1", "conv2"], images, 0.3)
    seen = []
    zeroed.norm2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    zeroed(images)
    expected = seen[0].mean((0, 2, 3))
    torch.testing.assert_close(zeroed.norm2.running_mean, expected, rtol=1e-3, atol=1e-4)


def test_a_channel_that_a_shortcut_keeps_alive_is_counted_where_it_is_read():
    model = models.build("cifar_resnet8_w4", 5).eval()
    images = pictures()
    second = "stages.0.0.conv2"  # it is added to the stem's output
    before = effective_cost(model, images)
    with torch.no_grad():
        model.get_submodule(second).weight[0] = 0
    after = effective_cost(model, images)
    assert before.macs - after.macs == 100 * 4 * 9
    assert before.params - after.params == 4 * 9


def test_linear_layers_are_counted_wherever_their_channels_are():
    class ChannelsLast(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(3, 7), nn.Linear(7, 2)

        def forward(self, x):
            return self.head(self.inner(x.permute(0, 2, 3, 1)).mean((1, 2)))

    model, images = ChannelsLast().eval(), torch.randn(2, 3, 4, 6)
    cost = count(model, (3, 4, 6))
    assert effective_cost(model, images).macs == cost.macs == 24 * 21 + 14
    assert effective_cost(model, images).params == cost.params
    images[:, 1] = 0
    assert effective_cost(model, images).macs == 24 * 14 + 14
    assert effective_cost(model, images).params == cost.params - 7


def test_dead_features_are_free_also_behind_a_flatten():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 6)).eval()
    images = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 0
    cost = effective_cost(model, images)
    assert cost.macs == 9 * 3 * 27 + 27 * 6
    assert cost.params == 3 * 28 + (27 + 1) * 6


def test_grouped_convolutions_count_all_that_they_read():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4)).eval()
    images = torch.randn(2, 4, 5, 5)
    images[:, 0] = 0
    assert effective_cost(model, images).macs == 9 * 8 * 9


def test_a_network_whose_train_returns_nothing_is_zeroed():
    network, macs, _ = zero_channels(Silent(small()), ["0.conv1", "0.conv2"], pictures(), 0.5)
    assert not network.training
    assert macs > 0
