import pytest
import torch
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


def test_what_only_attributes_tell_is_recognised_too():
    """Torchvision's pretrained GoogLeNet normalises images anew, which nothing else shows."""
    for arguments in ({}, {"transform_input": True}, {"transform_input": True, "aux_logits": True}):
        built = models.Architecture("torchvision:googlenet", 4, arguments)
        network = built.build()
        assert network.transform_input is ("transform_input" in arguments)
        assert models.architecture_of(network, 4) == built
    network.dropout_is_off = True
    assert models.architecture_of(network, 4).name == "torchvision.models.googlenet:GoogLeNet"


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("resnet10t", (2, 4)),
        ("resnet10t", (-1,)),
        ("mobilenetv3_small_050", (1, 3)),
        ("convnext_atto", (3,)),
        ("resnetv2_50", (0, 4)),
    ],
)
def test_of_timm_s_features_those_that_were_chosen_are_built_again(name, chosen):
    arguments = {"features_only": True, "out_indices": list(chosen)}
    network = models.build(f"timm:{name}", 0, arguments).eval()
    found = models.architecture_of(network, 0).build().eval()
    shapes = [[x.shape for x in one(torch.randn(1, 3, 64, 64))] for one in (network, found)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_timm_s_own_choice_of_features_is_no_argument(name):
    built = models.Architecture(f"timm:{name}", 0, {"features_only": True})
    assert models.architecture_of(built.build(), 0) == built


def test_a_library_s_network_that_has_run_is_recognised():
    network = models.build("timm:levit_128s", 4).eval()
    with torch.no_grad():
        network(torch.randn(1, 3, 224, 224))  # which fills caches
    assert models.architecture_of(network, 4).name == "timm:levit_128s"


def hook(network):
    network.layer2.register_forward_hook(lambda _, inputs, output: output / 4)


def pre_hook(network):
    network.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 4,))


def own_forward(network):
    network.forward = lambda x: type(network).forward(network, x) / 4


def other_container(network):
    network.feature_info = network.feature_info[:2]


@pytest.mark.parametrize("alter", [hook, pre_hook, own_forward, other_container])
def test_a_library_s_network_that_was_altered_is_not_taken_for_the_library_s(alter):
    network = models.build("timm:resnet10t", 4)
    assert models.architecture_of(network, 4).name == "timm:resnet10t"
    alter(network)
    assert models.architecture_of(network, 4).name == "timm.models.resnet:ResNet"


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
        ("cifar_resnet8_w0", "model 'cifar_resnet8_w0': the width must be from 1 to 512"),
        ("cifar_vgg16_w0", "model 'cifar_vgg16_w0': the width must be from 1 to 512"),
        ("cifar_vgg12", "model 'cifar_vgg12': the depth must be one of 11, 13, 16, 19"),
        ("cifar_vgg16_bn", "model 'cifar_vgg16_bn' is unknown; names look like"),
        ("timm:resnet5O", "model 'timm:resnet5O' is unknown; did you mean 'resnet50'?"),
        ("torchvision:resnet19", "model 'torchvision:resnet19' is unknown; did you mean 'resnet1"),
        ("torchvision:fasterrcnn", "model 'torchvision:fasterrcnn' is unknown"),
        ("keras:resnet50", "model 'keras:resnet50' is unknown: there is no module 'keras'"),
        ("timm:", "model 'timm:' is unknown"),
    ],
)
def test_an_unknown_name_is_refused_with_what_would_be_right(name, message):
    with pytest.raises(UserError) as told:
        models.build(name, 2)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("name", "classes"), [("resnet101", 5), ("vgg13_bn", 1000)])
def test_of_a_library_s_networks_that_of_the_right_size_is_built_first(name, classes, monkeypatch):
    network = models.build(f"torchvision:{name}", classes)
    built = []
    build = models.Architecture.build

    def noted(architecture):
        built.append(architecture.name)
        return build(architecture)

    monkeypatch.setattr(models.Architecture, "build", noted)
    assert models.architecture_of(network, classes).name == f"torchvision:{name}"
    assert built == [f"torchvision:{name}"]
