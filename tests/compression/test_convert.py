import copy

import pytest
import torch
from small_networks import Small, pictures, small
from torch import nn

from sbf_dist.compression.candidates import forward_order
from sbf_dist.compression.convert import convert
from sbf_dist.compression.cost import count
from sbf_dist.compression.plan import DenseLayer, Plan, Removed, SBFLayer
from sbf_dist.errors import UserError
from sbf_dist.layers import SBFConv2d
from sbf_dist.weights import load_weights, save_weights


def dense(convertible=True):
    return DenseLayer(reason="test", macs=1, convertible=convertible)


def every_other(channels, per_channel=2, **changes):
    kept = list(range(0, channels, 2))
    return SBFLayer(
        **(
            {
                "channels": channels,
                "kept": kept,
                "sources": [
                    [kept[(p + s) % len(kept)] for s in range(per_channel)]
                    for p in range(channels - len(kept))
                ],
                "transform_size": 3,
                "macs_before": 1,
                "macs_after": 1,
                "error": 0.0,
                "reason": "test",
            }
            | changes
        )
    )


def plan(**layers):
    return Plan(
        model="small",
        classes=5,
        input_shape=(3, 10, 10),
        budget={"macs": 0.5},
        macs_before=1,
        macs_after=1,
        params_before=1,
        params_after=1,
        layers=layers,
    )


def test_planned_layers_become_sbf_layers_and_the_others_stay():
    model = small()
    before = copy.deepcopy(model.state_dict())
    student = convert(model, plan(stem=dense(), conv1=every_other(16), conv2=dense()))
    assert isinstance(student.conv1, SBFConv2d)
    assert student.conv1.kept == tuple(range(0, 16, 2))
    assert type(student.conv2) is nn.Conv2d
    # The model itself is not touched, nor shared.
    assert type(model.conv1) is nn.Conv2d
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_kept_channels_are_those_of_the_dense_layer():
    model = small(norm=False)
    student = convert(model, plan(stem=dense(), conv1=dense(), conv2=every_other(16)))
    x = torch.randn(2, 16, 9, 9)
    torch.testing.assert_close(student.conv2(x)[:, ::2], model.conv2(x)[:, ::2])


def test_a_converted_layer_has_a_bias_that_is_nothing_where_there_was_none():
    student = convert(small(norm=True), plan(stem=dense(), conv1=every_other(16), conv2=dense()))
    assert torch.equal(student.conv1.bias, torch.zeros(16))
    assert student.conv1.bias.requires_grad
    model = small(norm=False).double()
    student = convert(model, plan(stem=dense(), conv1=every_other(16), conv2=dense()))
    assert torch.equal(student.conv1.bias, model.conv1.bias)
    assert student.conv1.bias.dtype == torch.float64


def test_macs_of_the_converted_network_follow_the_formula():
    model = small()
    layers = plan(stem=dense(), conv1=every_other(16, per_channel=3), conv2=dense())
    saved = 100 * 8 * 8 * 9 - 100 * 8 * 3 * 9
    before, after = (count(m, (3, 10, 10)) for m in (model, convert(model, layers)))
    assert before.macs - after.macs == saved


@pytest.mark.parametrize("unknown", ["stem", "conv1", "conv2"])
def test_a_network_with_a_layer_that_the_plan_does_not_know_is_refused(unknown):
    layers = {name: dense() for name in ("stem", "conv1", "conv2") if name != unknown}
    with pytest.raises(UserError, match=f"plan has no layer {unknown}: .*'small'"):
        convert(small(), plan(**layers))


def test_of_several_unknown_layers_the_first_is_named():
    with pytest.raises(UserError, match="plan has no layer stem"):
        convert(small(), plan())


@pytest.mark.parametrize("name", ["conv3", "head", "norm1"])
def test_a_plan_for_a_layer_that_is_no_convolution_of_the_network_is_refused(name):
    layers = plan(stem=dense(), conv1=dense(), conv2=dense(), **{name: every_other(16)})
    with pytest.raises(UserError, match=f"names layer {name}, which this network does not have"):
        convert(small(), layers)


def test_a_plan_with_other_channels_is_refused():
    with pytest.raises(UserError, match="gives layer conv1 12 channels, this network 16"):
        convert(small(), plan(stem=dense(), conv1=every_other(12), conv2=dense()))


def test_a_plan_that_does_not_fit_the_groups_is_refused_in_one_line():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    layer = every_other(4, kept=[0, 1], sources=[[0], [1]])
    with pytest.raises(UserError, match=r"^plan, layer 0: kept has \[2, 0\] channels in its gro"):
        convert(model, plan(**{"0": layer}))


class Standardised(nn.Conv2d):
    """As timm's StdConv2d: not what its weights alone say."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


class Scaled(nn.Conv2d):
    """No convolution: its outputs are scaled by its input."""

    def forward(self, x):
        return super().forward(x) * x.mean()


def test_a_dense_layer_stays_as_it_was_and_a_planned_one_has_the_filters_that_were_computed():
    model = nn.Sequential(Standardised(3, 4, 3))
    student = convert(model, plan(**{"0": dense(convertible=False)}))
    assert type(student[0]) is Standardised
    weight = model[0].weight / model[0].weight.std()
    student = convert(model, plan(**{"0": every_other(4)}))
    torch.testing.assert_close(student[0].basis.weight, weight[::2])


def test_a_plan_may_not_replace_what_is_no_convolution():
    model = nn.Sequential(Scaled(3, 4, 3))
    assert type(convert(model, plan(**{"0": dense(convertible=False)}))[0]) is Scaled
    with pytest.raises(UserError, match="layer 0, which must stay as it is: Scaled computes some"):
        convert(model, plan(**{"0": every_other(4)}))


class Held(nn.Module):
    """Convolutions that stand under two names, in a plain list, and in a block with two names."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.features = nn.Sequential(self.conv, self.norm)
        self.listed = [nn.Conv2d(8, 8, 3, padding=1)]
        self.add_module("registered", self.listed[0])
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1))
        self.again = self.block

    def forward(self, x):
        x = self.listed[0](self.features(self.stem(x)))
        return self.again(x).mean((2, 3))


def held_plan():
    layers = {name: every_other(8) for name in ("conv", "registered", "block.0")}
    return plan(stem=dense(), **layers)


def test_a_module_with_several_names_or_in_a_list_is_replaced_wherever_it_is_held():
    torch.manual_seed(0)
    model = Held().eval()
    assert forward_order(model, pictures(2)) == ["stem", "conv", "registered", "block.0"]
    student = convert(model, held_plan())
    assert student.features[0] is student.conv
    assert student.listed[0] is student.registered
    assert student.again[0] is student.block[0]
    # It costs less, so no dense convolution is left in use; the model is what it was.
    before, after = (count(network, (3, 10, 10)) for network in (model, student))
    assert before.macs - after.macs == 64 * (2 * 4 * 8 * 9 + 4 * 8 - 3 * 4 * 2 * 9)
    assert not any(isinstance(module, SBFConv2d) for module in model.modules())


def test_a_network_with_aliases_is_saved_and_loaded(tmp_path):
    student = convert(Held(), held_plan())
    for module in student.modules():
        if isinstance(module, SBFConv2d):
            nn.init.normal_(module.transforms)
    save_weights(student, tmp_path / "weights.safetensors")
    again = convert(Held(), held_plan())
    load_weights(again, tmp_path / "weights.safetensors")
    x = pictures(2)
    assert torch.equal(again.eval()(x), student.eval()(x))


def test_plan_and_weights_make_the_same_network_again():
    layers = plan(stem=dense(), conv1=every_other(16), conv2=every_other(16))
    student = convert(small(seed=1), layers)
    torch.nn.init.normal_(student.conv1.transforms)
    again = convert(small(seed=2), Plan.model_validate_json(layers.model_dump_json()))
    again.load_state_dict(student.state_dict())
    x = pictures(2)
    assert torch.equal(again(x), student(x))


def removing(**removed):
    """A plan for Small that removes channels, makes an SBF layer of conv1, and keeps the rest."""
    left = 16 - len(removed["conv1"]["out"]) if "conv1" in removed else 16
    layers = plan(stem=dense(), conv1=every_other(left), conv2=dense())
    cut = {name: Removed(**channels) for name, channels in removed.items()}
    return layers.model_copy(update={"removed": cut})


CUT = {
    "conv1": {"out": [3, 5, 8, 9]},
    "norm1": {"out": [3, 5, 8, 9]},
    "conv2": {"inp": [3, 5, 8, 9]},
}


def test_channels_are_removed_before_sbf_layers_are_put_in():
    model = small()
    student = convert(model, removing(**CUT)).eval()
    left = [c for c in range(16) if c not in CUT["conv1"]["out"]]
    assert isinstance(student.conv1, SBFConv2d)
    assert student.conv1.kept == tuple(range(0, 12, 2))
    assert torch.equal(student.conv1.basis.weight, model.conv1.weight[left[::2]])
    assert torch.equal(student.conv2.weight, model.conv2.weight[:, left])
    assert torch.equal(student.norm1.running_mean, model.norm1.running_mean[left])
    assert student(pictures(2)).shape == (2, 5)
    assert model.conv1.out_channels == 16


def test_a_removal_of_a_channel_that_is_not_there_names_it():
    with pytest.raises(UserError, match=r"^plan removes channel 70 of conv1, which has 16$"):
        convert(small(), removing(**CUT | {"conv1": {"out": [3, 5, 8, 70]}}))


def test_removals_of_which_a_part_is_missing_are_refused_with_the_place():
    cut = {name: channels for name, channels in CUT.items() if name != "norm1"}
    with pytest.raises(UserError, match="does not fit together at or after norm1"):
        convert(small(), removing(**cut))


def test_a_layer_that_is_numbered_as_before_the_removal_is_refused():
    layers = removing(**CUT)
    wrong = layers.model_copy(update={"layers": {**layers.layers, "conv1": every_other(16)}})
    with pytest.raises(UserError, match="gives layer conv1 16 channels, this network 12"):
        convert(small(), wrong)


def test_a_network_made_on_the_meta_device_works_once_its_weights_are_assigned():
    planned = plan(stem=dense(), conv1=every_other(16), conv2=every_other(16, per_channel=1))
    student = convert(small(), planned).eval()
    state = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with torch.device("meta"):
        network = Small()
        made = convert(network, planned)
    made.load_state_dict(state, assign=True)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(made.eval()(pictures(2)), student(pictures(2)))
    assert not any(tensor.is_meta for tensor in [*made.parameters(), *made.buffers()])
