import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sbf_dist.layers import SBFConv2d

KEPT = [0, 2, 5, 6]
SOURCES = [[0, 2], [5, 6], [6, 0], [2, 2]]


def layer(**arguments):
    """Make a layer of 4 kept and 4 rebuilt channels, with transforms that all differ."""
    torch.manual_seed(0)
    made = SBFConv2d(
        **(
            {
                "in_channels": 4,
                "out_channels": 8,
                "kernel_size": 3,
                "kept": KEPT,
                "sources": SOURCES,
            }
            | arguments
        )
    )
    nn.init.normal_(made.transforms)
    return made


def composed(sbf, x):
    """Compute the layer channel by channel, straight from its definition."""
    z = sbf.basis(x)
    u = z if sbf.between is None else sbf.between(z)
    position = {channel: b for b, channel in enumerate(sbf.kept)}
    rebuilt = iter(range(len(sbf.rebuilt_from)))
    channels = []
    for channel in range(sbf.out_channels):
        if channel in position:
            y = z[:, position[channel]]
        else:
            p = next(rebuilt)
            y = sum(
                F.conv2d(u[:, [position[source]]], t[None, None], padding=sbf.transform_size // 2)[
                    :, 0
                ]
                for source, t in zip(sbf.rebuilt_from[p], sbf.transforms[p], strict=True)
            )
        channels.append(y if sbf.bias is None else y + sbf.bias[channel])
    return torch.stack(channels, dim=1)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"kernel_size": (1, 5), "padding": (0, 2), "stride": (2, 1)},
        {"groups": 2, "padding": 1},
        {"padding": 1, "padding_mode": "reflect", "bias": False},
        {"transform_size": 1},
        {"transform_size": 5, "padding": 1},
    ],
)
def test_layer_follows_its_definition_and_has_the_shape_of_conv2d(arguments):
    sbf = layer(**arguments)
    conv_arguments = {k: v for k, v in arguments.items() if k != "transform_size"}
    dense = nn.Conv2d(**({"in_channels": 4, "out_channels": 8, "kernel_size": 3} | conv_arguments))
    x = torch.randn(2, 4, 11, 12)
    assert sbf(x).shape == dense(x).shape
    torch.testing.assert_close(sbf(x), composed(sbf, x))
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(sbf, name) == getattr(dense, name)


def operators_called(function, *args):
    """Name the operators of this package that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*args)
    return {event.key for event in profile.key_averages() if event.key.startswith("sbf::")}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"kernel_size": 1},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": (2, 1)},
        {"kernel_size": (1, 5), "padding": (0, 2), "stride": (2, 1)},
        {"groups": 2, "padding": 1},
        {"bias": False},
        {"transform_size": 1},
        {"transform_size": 5, "padding": 1},
        {"dtype": torch.float64},
    ],
)
def test_without_gradients_the_layer_is_one_operator_with_the_same_result(arguments, layout):
    sbf = layer(**arguments).to(memory_format=layout)
    x = torch.randn(2, 4, 11, 12, dtype=sbf.transforms.dtype).contiguous(memory_format=layout)
    assert operators_called(sbf, x) == {"sbf::expand"}
    trained = sbf(x)
    with torch.no_grad():
        assert "sbf::conv2d" in operators_called(sbf, x)
        y = sbf(x)
    assert not y.requires_grad and y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, trained.detach())


@pytest.mark.parametrize(
    "arguments", [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}]
)
def test_paddings_that_the_operator_does_not_know_take_two_without_gradients(arguments):
    sbf = layer(**arguments)
    x = torch.randn(2, 4, 11, 12)
    trained = sbf(x)
    with torch.no_grad():
        assert operators_called(sbf, x) == {"sbf::expand"}
        torch.testing.assert_close(sbf(x), trained.detach())


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_the_basis_are_called_without_gradients(register):
    sbf = layer(padding=1)
    x = torch.randn(2, 4, 9, 9)
    seen = []
    with torch.no_grad():
        wanted = sbf(x)
        hook = getattr(sbf.basis, register)(lambda _, inputs, *output: seen.append(inputs))
        torch.testing.assert_close(sbf(x), wanted)
        assert len(seen) == 1 and seen[0][0] is x
        hook.remove()
        assert torch.equal(sbf(x), wanted)
    assert len(seen) == 1


def test_all_channels_kept_is_the_dense_convolution():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    sbf = SBFConv2d.from_conv(conv, range(5), [])
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(sbf(x), conv(x))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_in_the_interior_the_layer_is_a_convolution_with_the_effective_filter(size, stride):
    sbf = layer(transform_size=size, stride=stride, padding=1).double()
    x = torch.randn(2, 4, 40, 40, dtype=torch.float64)
    reach = stride * (size - 1)
    dense = sbf.effective_filter()
    assert dense.shape == (8, 4, 3 + reach, 3 + reach)
    expected = F.conv2d(x, dense, sbf.bias, stride=stride, padding=1 + reach // 2)
    inside = (..., slice(size, -size), slice(size, -size))
    torch.testing.assert_close(sbf(x)[inside], expected[inside])


@pytest.mark.parametrize("arguments", [{"dilation": 2}, {"groups": 2}])
def test_effective_filter_of_dilated_or_grouped_layers_is_refused(arguments):
    with pytest.raises(ValueError, match="dilation 1 and groups 1, got"):
        layer(**arguments).effective_filter()


def test_initial_transforms_keep_the_variance():
    made = SBFConv2d(4, 8, 3, KEPT, [[0, 2], [5, 6], [6, 0], [2, 5]])
    expected = torch.zeros(4, 2, 3, 3)
    expected[:, :, 1, 1] = 1 / math.sqrt(2)
    assert torch.equal(made.transforms, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_from_conv_copies_filters_bias_and_settings(layout):
    conv = nn.Conv2d(
        4,
        8,
        (3, 5),
        stride=(1, 2),
        padding=(2, 1),
        groups=2,
        padding_mode="circular",
        dtype=torch.float64,
    ).to(memory_format=layout)
    conv.weight.requires_grad_(False)
    conv.eval()
    sbf = SBFConv2d.from_conv(conv, KEPT, SOURCES, 3)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    kept = list(sbf.kept)
    torch.testing.assert_close(sbf(x)[:, kept], conv(x)[:, kept])
    assert torch.equal(sbf.bias, conv.bias) and sbf.bias is not conv.bias
    assert sbf.basis.weight.is_contiguous(memory_format=layout)
    assert not sbf.training and not sbf.basis.weight.requires_grad and sbf.bias.requires_grad
    assert sbf.basis.weight.data_ptr() != conv.weight.data_ptr()


def test_channels_last_images_give_channels_last_features():
    sbf = layer(padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 9, 9).to(memory_format=torch.channels_last)
    assert sbf(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(sbf(x), sbf(x.contiguous()))


def test_training_reaches_every_parameter():
    sbf = layer()
    sbf(torch.randn(2, 4, 9, 9)).square().sum().backward()
    assert sorted(name for name, _ in sbf.named_parameters()) == [
        "basis.weight",
        "bias",
        "transforms",
    ]
    assert all(p.grad.abs().min() > 0 for p in sbf.parameters())


def test_layer_compiles_to_one_graph():
    sbf = layer(padding=1)
    compiled = torch.compile(sbf, fullgraph=True)
    results = []
    for function in (sbf, compiled):
        sbf.zero_grad()
        x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = function(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad.clone() for p in sbf.parameters())])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced)


def test_autocast_computes_in_bfloat16_and_trains_in_float():
    sbf = layer(padding=1)
    x = torch.randn(2, 4, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y = sbf(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in sbf.parameters())
    torch.testing.assert_close(y.float(), sbf(x), rtol=0, atol=0.05 * sbf(x).abs().max().item())


def test_autocast_without_gradients_computes_in_bfloat16():
    sbf = layer(padding=1)
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            y = sbf(x)
        exact = sbf(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())


def test_state_dict_holds_parameters_only_and_loads_without_pickle():
    sbf, other = layer(), layer()
    nn.init.normal_(other.transforms)
    file = io.BytesIO()
    torch.save(sbf.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state) == {"basis.weight", "transforms", "bias"}
    other.load_state_dict(state)
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(sbf(x), other(x))


def test_deepcopy_is_independent():
    sbf = layer()
    x = torch.randn(2, 4, 9, 9)
    before = sbf(x).detach()
    other = copy.deepcopy(sbf)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        other.transforms.zero_()
    assert torch.equal(sbf(x), before)


def test_layer_made_on_the_meta_device_works_once_it_is_reset():
    sbf = layer()
    made = SBFConv2d(4, 8, 3, KEPT, SOURCES, device="meta")
    assert made(torch.empty(2, 4, 9, 9, device="meta")).shape == (2, 8, 7, 7)
    made.to_empty(device="cpu")
    made.reset_parameters()
    made.load_state_dict(sbf.state_dict())
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(made(x), sbf(x))


def test_loading_a_state_dict_wires_a_layer_that_has_no_values():
    sbf = layer()
    x = torch.randn(2, 4, 9, 9)
    assigned = SBFConv2d(4, 8, 3, KEPT, SOURCES, device="meta")
    assigned.load_state_dict(sbf.state_dict(), assign=True)
    emptied = SBFConv2d(4, 8, 3, KEPT, SOURCES, device="meta").to_empty(device="cpu")
    emptied.sources.fill_(99)
    emptied.order.fill_(99)
    emptied.load_state_dict(sbf.state_dict())
    for made in (assigned, emptied):
        assert made.sources.device.type == made.order.device.type == "cpu"
        assert torch.equal(made(x), sbf(x))
        with torch.no_grad():
            torch.testing.assert_close(made(x), sbf(x))


def test_repr_tells_what_is_kept_and_what_is_rebuilt():
    assert "SBFConv2d(\n  4, 8, kept=4, rebuilt=4, sources=2, transform_size=3\n" in repr(layer())
    assert "bias=False" in layer(bias=False).extra_repr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transform_size": 2}, r"transform_size is 2: it must be odd"),
        ({"out_channels": 9, "groups": 2}, r"out_channels is 9: .* multiple of groups, 2"),
        ({"kept": [2, 0, 3, 6]}, r"kept is \[2, 0, 3, 6\]: .*ascending"),
        ({"kept": []}, r"kept is \[\]"),
        ({"kept": [0, 2, 3, 8]}, r"kept is \[0, 2, 3, 8\]: .*\[0, 8\)"),
        ({"kept": [0, 1, 2, 6], "groups": 2}, r"kept has \[3, 1\] channels in its groups"),
        ({"sources": SOURCES[:3]}, r"sources has 3 rows: .*each of the 4 channels"),
        ({"sources": [[0], [2], [5], [0, 2]]}, r"lengths \[1, 2\]"),
        ({"sources": [[0], [2], [5], [1]]}, r"sources names channels \[1\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        layer(**arguments)


# --- something between basis and transformations -------------------------------------------------


def bn_relu():
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -0.5, 0.5)
    nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    return nn.Sequential(norm, nn.ReLU())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_what_stands_between_is_seen_by_rebuilt_channels_only(bias, grad):
    sbf = layer(between=bn_relu(), bias=bias).eval()
    x = torch.randn(2, 4, 7, 6)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(sbf(x), composed(sbf, x))
        plain = layer(bias=bias)
        plain.load_state_dict(sbf.state_dict(), strict=False)
        assert torch.equal(sbf(x)[:, KEPT], plain(x)[:, KEPT])
        assert not torch.allclose(sbf(x), plain(x))


def test_what_stands_between_is_trained_saved_and_initialised_with_the_layer():
    sbf = layer(between=bn_relu()).train()
    sbf(torch.randn(4, 4, 7, 6)).square().sum().backward()
    for name, parameter in sbf.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert {"between.0.weight", "between.0.running_mean"} <= set(sbf.state_dict())
    assert int(sbf.between[0].num_batches_tracked) == 1
    sbf.reset_parameters()
    assert torch.equal(sbf.between[0].weight, torch.ones(4))
    assert layer().between is None
    assert "between" not in "".join(layer().state_dict())


def test_no_filter_equals_a_layer_with_something_between():
    with pytest.raises(ValueError, match="between its parts"):
        layer(between=bn_relu()).effective_filter()


def test_from_conv_takes_what_stands_between():
    conv = nn.Conv2d(4, 8, 3)
    between = bn_relu()
    assert SBFConv2d.from_conv(conv, KEPT, SOURCES, 3, between).between is between


@pytest.mark.parametrize(
    ("groups", "kept", "sources"),
    [(1, [0, 1, 2, 3], [[0, 1], [1, 2], [2, 3], [3, 0]]), (2, [0, 1, 4, 5], None)],
)
def test_numbers_of_kept_channels_and_sources_are_enough(groups, kept, sources):
    made = layer(kept=4, sources=2, groups=groups, padding=1)
    assert list(made.kept) == kept
    if sources is not None:
        assert [list(row) for row in made.rebuilt_from] == sources
    used = [source for row in made.rebuilt_from for source in row]
    assert {used.count(channel) for channel in kept} == {2}  # all alike
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(made(x), composed(made, x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kept": 0}, "kept is 0: it must be a multiple of groups, 1, from 1 to the 8 of"),
        ({"kept": 9}, "kept is 9: "),
        ({"kept": 3, "groups": 2}, "kept is 3: it must be a multiple of groups, 2"),
        ({"kept": 4, "sources": 0}, r"sources is 0: it must lie in \[1, 4\]"),
        ({"kept": 4, "sources": 5}, r"sources is 5: it must lie in \[1, 4\]"),
    ],
)
def test_numbers_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        layer(**arguments)
