import copy

import pytest
import torch
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

from sbf_dist.export.fold import fold_batchnorm
from sbf_dist.export.optimize import optimize
from sbf_dist.export.standard_operators import with_standard_operators
from sbf_dist.layers import SBFConv2d
from sbf_dist.surgery import become, deep_copy, to_convolution, with_convolutions


def sbf():
    kept = [0, 2, 4, 6]
    layer = SBFConv2d(8, 8, 3, kept, [kept[:2]] * 4, padding=1)
    nn.init.normal_(layer.transforms)
    return layer


class Held(nn.Module):
    """Each layer is called by another name than its first, or from a plain list."""

    def __init__(self, *, traceable=True):
        super().__init__()
        self.first, self.norm1 = sbf(), nn.BatchNorm2d(8)
        self.block = nn.Sequential(self.first, self.norm1)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.listed = [self.second, self.norm2]
        self.traceable = traceable

    def forward(self, x):
        x = self.block(x)
        if not self.traceable and x.sum() > 1e9:
            return x
        for module in self.listed:
            x = module(x)
        return x.relu().mean((2, 3))


def held(**settings):
    torch.manual_seed(0)
    network = Held(**settings)
    for norm in (network.norm1, network.norm2):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return network.eval()


def test_a_module_is_another_wherever_it_is_held():
    network = held()
    x = torch.randn(2, 8, 7, 7)
    become(network.first, nn.Identity())
    assert type(network.first) is nn.Identity
    assert network.block[0] is network.first
    assert not [name for name, _ in network.named_parameters() if "first" in name]
    assert torch.equal(network.block(x), network.norm1(x))


def test_what_it_has_become_can_be_copied_saved_and_moved():
    one, other = held(), held()
    torch.manual_seed(1)
    become(one.first, sbf())
    state = copy.deepcopy(one).state_dict()
    assert {"first.transforms", "block.0.transforms"} <= state.keys()
    other.load_state_dict(state)
    x = torch.randn(2, 8, 7, 7)
    assert torch.equal(other(x), one(x))
    assert one.double().block[0].transforms.dtype == torch.float64


@pytest.mark.parametrize("traceable", [True, False])
def test_layers_are_folded_and_fused_wherever_they_are_held(traceable):
    network = held(traceable=traceable)
    x = torch.randn(2, 8, 7, 7)
    expected = network(x)
    for changed in (
        fold_batchnorm(network),
        with_standard_operators(fold_batchnorm(network)),
        optimize(network),
    ):
        with torch.inference_mode():
            torch.testing.assert_close(changed(x), expected, rtol=1e-4, atol=1e-5)
    folded = fold_batchnorm(network)
    assert (type(folded.listed[1]) is nn.Identity) == traceable


def test_a_convolution_that_stands_for_an_sbf_layer_has_the_filters_that_are_left():
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    sbf = SBFConv2d.from_conv(conv, [1, 4, 6], [[1, 4]] * 5).eval()
    plain = to_convolution(sbf)
    assert type(plain) is nn.Conv2d
    assert torch.equal(plain.weight[[1, 4, 6]], conv.weight[[1, 4, 6]])
    assert int(plain.weight.flatten(1).any(1).sum()) == 3
    assert torch.equal(plain.bias, conv.bias)
    assert (plain.stride, plain.padding, plain.training) == ((2, 2), (1, 1), False)
    network = nn.Sequential(sbf, nn.ReLU())
    stand_in = with_convolutions(network)
    assert type(stand_in[0]) is nn.Conv2d
    assert network[0] is sbf, "the network stays as it is"
    assert stand_in.state_dict().keys() == nn.Sequential(conv).state_dict().keys()


class Dropping(nn.Module):
    """A traced one has a graph for each mode: dropout's is a constant of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return nn.functional.dropout(self.norm(self.conv(x)), 0.5, self.training)


@pytest.mark.parametrize("wrap", [lambda traced: traced, nn.Sequential])
def test_the_copy_of_a_traced_network_is_in_its_mode(wrap):
    traced = create_feature_extractor(Dropping(), {"norm": "features", "dropout": "out"})
    x = torch.randn(4, 3, 8, 8)
    model = wrap(traced).eval()
    copied = deep_copy(model)
    assert [part.training for part in copied.modules()] == [False] * len(list(model.modules()))
    assert torch.equal(copied(x)["out"], model(x)["out"])
    model.train()
    traced.norm.eval()
    modes = {name: part.training for name, part in deep_copy(model).named_modules()}
    assert modes == {name: part.training for name, part in model.named_modules()}
    assert not deep_copy(model).eval().training
    assert torch.equal(deep_copy(model).eval()(x)["out"], copied(x)["out"])


def test_the_copy_of_a_traced_network_has_its_forward_hooks_once():
    traced = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    handle = traced.register_forward_pre_hook(lambda _, given: (2 * given[0],))
    traced.register_forward_hook(lambda _, given, output: output + 1)
    x = torch.randn(2, 3, 8, 8)
    for wrapped in (traced, nn.Sequential(traced)):
        assert torch.equal(deep_copy(wrapped)(x), wrapped(x))
    before = deep_copy(traced)
    handle.remove()
    assert not torch.equal(before(x), traced(x))
