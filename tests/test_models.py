from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sbf_dist import models
from sbf_dist.compression.cost import count
from sbf_dist.errors import UserError


@pytest.mark.parametrize(
    ("name", "classes", "depth", "width"),
    [("cifar_resnet8", 10, 8, 16), ("cifar_resnet14_w6", 3, 14, 6), ("cifar_resnet20", 7, 20, 16)],
)
def test_cifar_networks_have_their_depth_width_and_classes(name, classes, depth, width):
    network = models.build(name, classes)
    weighted = [
        module
        for path, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in path
    ]
    assert len(weighted) == depth
    assert network.conv.out_channels == width
    assert network.head.in_features == 4 * width
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, classes)


def test_cifar_resnet20_costs_what_the_paper_says():
    cost = count(models.build("cifar_resnet20", 10), (3, 32, 32))
    # 0.27 M parameters, 40.8 M multiply-adds; the shortcuts here are convolutions.
    assert cost.params == pytest.approx(0.27e6, rel=0.03)
    assert cost.macs == pytest.approx(40.8e6, rel=0.02)


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_cifar_vggs_have_their_depth_width_and_classes(depth):
    network = models.build(f"cifar_vgg{depth}_w2", 7)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == depth - 3  # three linear layers have become one
    assert [conv.out_channels for conv in (convolutions[0], convolutions[-1])] == [2, 16]
    assert network.head.in_features == 16
    for side in (32, 20, 16):
        assert network.eval()(torch.randn(2, 3, side, side)).shape == (2, 7)


def test_cifar_vgg16_costs_what_the_literature_says():
    cost = count(models.build("cifar_vgg16", 10), (3, 32, 32))
    # Li et al. (arXiv 1608.08710): 3.13e8 multiply-adds; 1.5e7 parameters with a wide linear layer
    assert cost.macs == pytest.approx(3.13e8, rel=0.002)
    assert cost.params == pytest.approx(1.47e7, rel=0.002)


@pytest.mark.parametrize("name", ["torchvision:googlenet", "torchvision:inception_v3"])
def test_networks_with_auxiliary_heads_come_without_and_return_logits_in_training(name):
    assert models.build(name, 4).train()(torch.randn(2, 3, 96, 96)).shape == (2, 4)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:shufflenet_v2_x0_5"])
def test_networks_of_the_libraries_have_the_classes_asked_for(name):
    assert models.build(name, 7).eval()(torch.randn(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet20", "model 'resnet20' is unknown; names look like cifar_resnet20"),
        ("cifar_resnet20x", "model 'cifar_resnet20x' is unknown; names look like"),
        ("", "model '' is unknown"),
        ("cifar_resnet18", "model 'cifar_resnet18': the depth must be 6n + 2 (8, 14"),
        ("cifar_resnet2", "the depth must be 6n + 2"),
        ("cifar_resnet8_w0", "model 'cifar_resnet8_w0': the width must be at least 1"),
        ("cifar_vgg16_w0", "model 'cifar_vgg16_w0': the width must be at least 1"),
        ("cifar_vgg12", "model 'cifar_vgg12': the depth must be one of 11, 13, 16, 19"),
        ("cifar_vgg16_bn", "model 'cifar_vgg16_bn' is unknown; names look like"),
        ("timm:resnet5O", "model 'timm:resnet5O' is unknown; did you mean 'resnet50'?"),
        ("torchvision:resnet19", "model 'torchvision:resnet19' is unknown; did you mean 'resnet1"),
        ("torchvision:fcn_resnet50", "model 'torchvision:fcn_resnet50' is unknown"),
        ("keras:resnet50", "model 'keras:resnet50' is unknown; names look like"),
        ("timm:", "model 'timm:' is unknown"),
    ],
)
def test_an_unknown_name_is_refused_with_what_would_be_right(name, message):
    with pytest.raises(UserError) as told:
        models.build(name, 2)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_saved_weights_are_loaded_again(tmp_path: Path):
    one, other = (models.build("cifar_resnet8_w4", 3) for _ in range(2))
    one.to(memory_format=torch.channels_last)
    with torch.no_grad():
        one.norm.running_mean.add_(3)
    path = tmp_path / "new" / "weights.safetensors"
    models.save_weights(one, path)
    models.load_weights(other, path)
    theirs = other.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def changed(change):
    """The state dict of a network, with one entry removed, added or of another shape."""
    state = models.build("cifar_resnet8_w4", 3).state_dict()
    change(state)
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("head.bias"), "lack head.bias, which the model has"),
        (lambda s: s.update(extra=torch.zeros(1)), "have extra, which the model does not know"),
        (
            lambda s: s.update({"head.bias": torch.zeros(4)}),
            "head.bias is (4,), the model wants (3,)",
        ),
    ],
)
def test_weights_of_another_network_are_refused_and_nothing_is_loaded(tmp_path, change, message):
    path = tmp_path / "weights.safetensors"
    save_file(changed(change), path)
    network = models.build("cifar_resnet8_w4", 3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError) as told:
        models.load_weights(network, path)
    assert str(told.value).startswith(f"weights {path}")
    assert message in str(told.value)
    assert all(torch.equal(v, before[name]) for name, v in network.state_dict().items())


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model."])
def test_weights_of_a_wrapped_network_are_refused_and_the_wrapper_is_named(tmp_path, wrapper):
    path = tmp_path / "weights.safetensors"
    state = models.build("cifar_resnet8_w4", 3).state_dict()
    save_file({f"{wrapper}{name}": value for name, value in state.items()}, path)
    with pytest.raises(
        UserError, match=f"have '{wrapper}' before every name, as a wrapper"
    ) as told:
        models.load_weights(models.build("cifar_resnet8_w4", 3), path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("inside", [False, True])
def test_a_state_dict_of_torch_save_is_read_also_out_of_a_checkpoint(tmp_path, inside):
    one, other = nn.Linear(2, 3), nn.Linear(2, 3)
    state = one.state_dict()
    torch.save({"epoch": 7, "state_dict": state} if inside else state, tmp_path / "weights.pth")
    models.load_weights(other, tmp_path / "weights.pth")
    assert torch.equal(one.weight, other.weight)


class _RunsCode:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return (Path.touch, (self.proof,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda folder: {"weight": _RunsCode(folder / "ran")}, "hold more than tensors"),
        (lambda _: nn.Linear(2, 3), "hold more than tensors"),
        (lambda _: [torch.zeros(1)], "are no state dict"),
        (lambda _: {"epoch": 7}, "are no state dict"),
    ],
)
def test_a_pickle_of_anything_but_tensors_is_refused_and_runs_nothing(tmp_path, content, message):
    torch.save(content(tmp_path), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message) as told:
        models.load_weights(nn.Linear(2, 3), tmp_path / "weights.pth")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "ran").exists()


def test_published_weights_of_auxiliary_heads_are_left_out(tmp_path):
    network = models.build("torchvision:googlenet", 3)
    state = network.state_dict() | {"aux1.conv.conv.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "weights.pth")
    models.load_weights(network, tmp_path / "weights.pth")


def test_a_network_that_wants_its_version_is_loaded(tmp_path):
    one, other = (models.build("torchvision:mnasnet0_5", 3).eval() for _ in range(2))
    models.save_weights(one, tmp_path / "weights.safetensors")
    models.load_weights(other, tmp_path / "weights.safetensors")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x08" + 15 * b"\0"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="are neither a safetensors file") as told:
        models.load_weights(nn.Linear(1, 1), path)
    assert "\n" not in str(told.value)


def test_weights_that_are_missing_or_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="do not exist"):
        models.load_weights(nn.Linear(1, 1), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="are neither a safetensors file"):
        models.load_weights(nn.Linear(1, 1), tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    models.save_weights(nn.Linear(9, 9), path)
    assert set(load_file(path)) == {"weight", "bias"}
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="are neither a safetensors file"):
        models.load_weights(nn.Linear(9, 9), path)
