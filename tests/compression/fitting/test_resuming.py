"""Passes that go on from where the last one left them."""

import pytest
import torch
from small_networks import pictures, small, small_densenet
from torch import nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.candidates import forward_order
from sbf_dist.compression.fitting.finding_cuts import find_cuts
from sbf_dist.compression.fitting.resuming import Passes
from sbf_dist.compression.fitting.shelf import Shelf
from sbf_dist.compression.fitting.statistics import measure_batch_norm, run_until
from sbf_dist.compression.one_shot import compress
from sbf_dist.models import build
from sbf_dist.settings import Compression

IMAGES = pictures(10, 32)
NETWORKS = [
    "cifar_resnet8",
    "cifar_vgg11_w16",
    "torchvision:mobilenet_v2",
    "torchvision:shufflenet_v2_x0_5",
    "small DenseNet",
    "timm:mobilenetv3_small_050",
    "timm:test_resnet",
    "small",
]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def network(name):
    torch.manual_seed(0)
    own = {"small": small, "small DenseNet": small_densenet}
    return own[name]().eval() if name in own else build(name, 5).eval()


def passes(model, layers, *, memory=2**30):
    cuts = find_cuts(model, IMAGES[:3], layers)
    return Passes(model, Calibration.of(IMAGES), cuts, Shelf(memory))


@pytest.mark.parametrize(
    ("name", "memory"),
    [("cifar_resnet8", 2**30), ("cifar_resnet8", 0), *((name, 2**18) for name in NETWORKS)],
)
def test_layers_are_given_bit_for_bit_what_a_whole_pass_gives_them(name, memory, monkeypatch):
    monkeypatch.setattr("sbf_dist.compression.calibration.PIXELS", 4 * 32 * 32)
    model = network(name)
    layers = forward_order(model, IMAGES[:2])
    going, calibration = passes(model, layers, memory=memory), Calibration.of(IMAGES)
    assert len({cut.position for cut in going._cuts.values()}) >= 2
    for layer in layers[:: max(1, len(layers) // 8)]:
        parts = list(calibration.parts(calibration.part))
        assert len(parts) == 3
        wanted = [run_until(model, layer, part, output=False) for part in parts]
        for first, count in ((3, 1), (10, 3), (10, 3)):  # some parts lag behind
            made = [inputs.clone() for inputs in going.inputs(layer, first)]
            assert len(made) == count
            assert all(map(torch.equal, made, wanted[:count]))
        outputs = torch.cat(list(going.outputs()))
        assert torch.equal(outputs, torch.cat([model(part) for part in parts]))
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_what_a_layer_gives_is_seen_on_the_way_to_the_next_point():
    model = network("cifar_resnet8")
    layers = forward_order(model, IMAGES[:2])
    going = passes(model, layers)
    seen = {}

    def look(start, inputs, output):
        seen.setdefault(start, []).append((inputs.clone(), output.clone()))

    for one, other, then in zip(layers[::2], layers[1::2], [*layers[2::2], None], strict=False):
        seen.clear()
        going.visit({one: look, other: look}, {one: 10, other: 5}, then)
        for layer, index in ((one, 0), (other, 1)):
            for output in (False, True):
                wanted = run_until(model, layer, IMAGES, output=output)
                found = torch.cat([found[index][output] for found in seen.values()])
                assert torch.equal(found, wanted)


class Counted(nn.Conv2d):
    """A convolution that counts the images that it was given."""

    seen = 0

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x)


def chain(depth):
    """Convolutions in a row, their names, and passes that have seen no image yet."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(Counted(3 if i == 0 else 4, 4, 3, padding=1) for i in range(depth)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()
    layers = [str(i) for i in range(depth)]
    going = passes(model, layers)
    for layer in model[:depth]:
        layer.seen = 0
    return model, layers, going


def test_each_layer_is_passed_a_number_of_times_that_does_not_grow_with_the_depth():
    model, layers, going = chain(12)
    for layer in layers:
        for _ in range(2):
            list(going.inputs(layer, 10))
    # A layer is not run for its own inputs, and once for those of the next.
    assert [model[i].seen for i in range(12)] == [10] * 11 + [0]


def test_images_that_are_not_wanted_yet_stay_behind_and_come_in_one_go(monkeypatch):
    monkeypatch.setattr("sbf_dist.compression.calibration.PIXELS", 5 * 32 * 32)
    model, layers, going = chain(6)
    for layer in layers[1:5]:
        assert len(list(going.inputs(layer, 1))) == 1
    assert [model[i].seen for i in range(6)] == [5, 5, 5, 5, 0, 0]
    assert len(list(going.inputs(layers[5], 10))) == 2
    assert [model[i].seen for i in range(6)] == [10, 10, 10, 10, 10, 0]


def test_it_is_known_which_layers_can_still_be_asked_for():
    _, layers, going = chain(6)
    assert all(going.are_before(name) for name in [*layers, None])
    list(going.inputs(layers[3], 1))
    # The part stays where a layer that was asked for begins: it is what is wanted next.
    assert [going.are_before(name) for name in layers] == [False] * 3 + [True] * 3
    assert going.are_before(None)
    assert not going.are_before("unknown")


def test_a_layer_that_has_changed_is_seen_changed():
    model = network("cifar_resnet8")
    layers = forward_order(model, IMAGES[:2])
    going = passes(model, layers)
    for layer in layers:
        list(going.inputs(layer, 10))
        model.get_submodule(layer).weight.mul_(1.1)
        following = layers[layers.index(layer) + 1 :][:1]
        for other in following:
            made = torch.cat([inputs.clone() for inputs in going.inputs(other, 10)])
            assert torch.equal(made, run_until(model, other, IMAGES, output=False))


def test_a_network_without_points_is_passed_from_its_first_layer():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv2d(3, 4, 3)
            self.two = nn.Conv2d(4, 4, 3)

        def forward(self, x):
            y = self.one(x)
            return (self.two(y) if y.mean() > 0 else self.two(-y)).mean((2, 3))

    model = Branching().eval()
    going = passes(model, ["one", "two"])
    assert going._cuts == {}
    made = torch.cat(list(going.inputs("two", 10)))
    assert torch.equal(made, run_until(model, "two", IMAGES, output=False))


def test_an_error_in_the_network_leaves_it_as_it_was():
    model = network("cifar_resnet8")
    layers = forward_order(model, IMAGES[:2])
    going = passes(model, layers)
    list(going.inputs(layers[3], 10))

    def fail(*_):
        raise RuntimeError("on purpose")

    hook = model.get_submodule(layers[4]).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        list(going.inputs(layers[5], 10))
    hook.remove()
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    wanted = run_until(model, layers[5], IMAGES, output=False)
    assert torch.equal(torch.cat([x.clone() for x in going.inputs(layers[5], 10)]), wanted)


@pytest.mark.parametrize(
    ("name", "memory"),
    [("cifar_resnet8", 1.0), ("cifar_resnet8", 0.0), ("cifar_vgg11_w16", 1e-4)],
)
def test_a_student_is_bit_for_bit_the_one_of_whole_passes(name, memory, monkeypatch):
    for place in ("layerwise.SUMS", "layerwise.TARGETS", "sequential.INPUTS"):
        monkeypatch.setattr(f"sbf_dist.compression.fitting.{place}", 2**20)
    monkeypatch.setattr("sbf_dist.compression.calibration.PIXELS", 10 * 32 * 32)
    model, images = network(name), pictures(32, 32)
    measure_batch_norm(model, images, 16)
    settings = Compression(macs=0.5, feature_memory=memory)
    student, plan = compress(model, images, settings)
    monkeypatch.setattr("sbf_dist.compression.fitting.resuming.find_cuts", lambda *_: {})
    whole, whole_plan = compress(model, images, settings)
    assert plan == whole_plan
    assert student.state_dict().keys() == whole.state_dict().keys()
    for key, value in whole.state_dict().items():
        assert torch.equal(student.state_dict()[key], value), key
