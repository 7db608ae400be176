"""What counts in a network's outputs, and how far those of two networks are apart."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from networks_of_all_kinds import Found, Several, UNet, Yolo, pictures_of, ready
from small_networks import small
from torch import nn
from torch.nn import functional as F

from sbf_dist import models
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.fidelity import OutputsFor, Wanted
from sbf_dist.compression.outputs import LEAST_SCALE, LOGITS, TEMPERATURE, Output, Yardstick
from sbf_dist.errors import UserError
from sbf_dist.settings import Compression

IMAGES = pictures_of(3)
Named = namedtuple("Named", ["logits", "aux"])


def yardstick(model: nn.Module, images=IMAGES, **settings) -> Yardstick:
    return Yardstick.of(model, Calibration.of(images), Compression(macs=0.5, **settings))


def kinds(model: nn.Module, images=IMAGES, **settings) -> dict[str, str]:
    return {output.name: output.kind for output in yardstick(model, images, **settings).outputs}


class Ends(nn.Module):
    """A convolution, pooling, a linear layer, and an end."""

    def __init__(self, end, num_classes=None):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 6)
        self.end = end
        if num_classes is not None:
            self.num_classes = num_classes

    def forward(self, x):
        return self.end(self, self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (lambda net, x: net.linear(x), "kl"),
        (lambda net, x: F.linear(x, net.linear.weight), "kl"),
        (lambda net, x: net.linear(x).log_softmax(1), "kl"),
        (lambda net, x: F.log_softmax(net.linear(x), 1), "kl"),
        (lambda net, x: net.linear(x).flatten(1).float(), "kl"),
        (lambda net, x: net.linear(x).softmax(1), "error"),
        (lambda net, x: F.normalize(net.linear(x)), "error"),
        (lambda net, x: net.linear(x)[:, :1], "error"),
        (lambda net, x: x, "error"),
    ],
)
def test_outputs_of_linear_layers_are_logits(end, kind):
    assert kinds(Ends(end)) == {"": kind}


def test_what_a_network_calls_its_classes_are_logits():
    assert kinds(Ends(lambda _, x: x, num_classes=8)) == {"": "kl"}
    assert kinds(Ends(lambda _, x: x, num_classes=0)) == {"": "error"}
    assert kinds(models.build("torchvision:squeezenet1_1", 7).eval(), pictures_of(3, 2, 64)) == {
        "": "kl"
    }
    assert kinds(models.build("timm:test_resnet", 0).eval(), pictures_of(3, 2, 64)) == {"": "error"}


def test_only_floats_that_depend_on_weights_and_have_a_row_for_each_image_count():
    assert kinds(ready(Yolo())) == {"maps.0": "error", "maps.1": "error"}
    assert kinds(ready(Several())) == {"logits": "kl", "box": "error", "more.0": "error"}


@pytest.mark.parametrize("frozen", [False, True])
def test_images_that_are_passed_on_do_not_count(frozen):
    model = Ends(lambda net, x: {"features": x, "out": net.linear(x)})
    passing = Passing(model).requires_grad_(not frozen)
    assert kinds(passing) == {"out.features": "error", "out.out": "kl"}
    assert [p.requires_grad for p in passing.parameters()] == [not frozen] * 4


class Passing(nn.Module):
    """Gives its images, and others made of them, beside its outputs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return {"image": x, "out": self.net(x), "small": F.avg_pool2d(x, 2)}


def test_outputs_are_chosen_by_their_names_numbers_and_structures():
    model = ready(Several())
    assert list(kinds(model, outputs="box")) == ["box"]
    assert list(kinds(model, outputs=["more", "logits"])) == ["more.0", "logits"]
    pair = Ends(lambda net, x: (x, net.linear(x)))
    assert list(kinds(pair, outputs=1)) == list(kinds(pair, outputs=["1"])) == ["1"]
    with pytest.raises(
        UserError, match="outputs: 'boxes' is not an output of Several that can be compared"
    ):
        kinds(model, outputs=["boxes"])
    with pytest.raises(UserError, match=r"Compression: outputs = 3\.5 must be names or numbers"):
        Compression(macs=0.5, outputs=3.5)


def test_the_kind_of_divergence_can_be_given():
    maps = ready(UNet(3))
    assert kinds(maps) == {"": "error"}
    assert kinds(maps, divergence="kl") == {"": "kl"}
    assert kinds(small(), divergence="error") == {"": "error"}
    one = Ends(lambda net, x: net.linear(x)[:, 0])
    with pytest.raises(UserError, match=r"divergence = 'kl': output of the network is \(2,\)"):
        kinds(one, divergence="kl")
    with pytest.raises(UserError, match="divergence = 'cosine' must be 'auto', 'kl', 'error'"):
        Compression(macs=0.5, divergence="cosine")


def test_errors_are_shares_of_the_variance_over_images_and_positions():
    model = ready(UNet(3))
    with torch.no_grad():
        output = model(IMAGES)
    (found,) = yardstick(model).outputs
    variance = output.double().movedim(1, -1).reshape(-1, 4).var(0, correction=0).mean()
    assert found.variance == pytest.approx(float(variance), rel=1e-5)
    # The mean of each channel explains nothing of the variance.
    means = output.mean((0, 2, 3), keepdim=True).expand_as(output)
    assert float(found.distances(means, output).mean()) == pytest.approx(1, rel=1e-4)
    assert float(found.distances(output, output).mean()) == 0
    # Of one image, where nothing varies over images, the mean square is the unit.
    model = Ends(lambda _, x: x)
    with torch.no_grad():
        square = float(model(IMAGES[:1]).square().mean())
    assert yardstick(model, IMAGES[:1]).outputs[0].variance == pytest.approx(square, rel=1e-5)


def test_divergence_of_maps_of_classes_is_the_mean_over_positions():
    torch.manual_seed(0)
    one, other = torch.randn(2, 3, 5, 4, 6)
    found = Output("", "kl").distances(one, other)
    rows = [t.movedim(1, -1).reshape(3, -1, 5).log_softmax(2) for t in (one, other)]
    wanted = F.kl_div(rows[0], rows[1], reduction="none", log_target=True).sum(2).mean(1)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "outputs",
    [
        (Output("", "kl"),),
        (Output("", "error", 2.5),),
        (Output("0", "kl"), Output("1", "error", 0.5)),
    ],
)
@pytest.mark.parametrize("shape", [(200, 4), (200, 4, 3, 2)])
def test_losses_drawn_at_random_tell_the_divergence_to_second_order(outputs, shape):
    torch.manual_seed(0)
    sticks = Yardstick(outputs)
    given = [torch.randn(shape, dtype=torch.double, requires_grad=True) for _ in outputs]
    errors = [0.02 * torch.randn(shape, dtype=torch.double) for _ in outputs]
    disturbed = [one.detach() + error for one, error in zip(given, errors, strict=True)]
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for loss in sticks.losses(given[0] if len(given) == 1 else given, generator, draws=200):
        gradients = torch.autograd.grad(loss, given, retain_graph=True)
        products = sum((g * e).flatten(1).sum(1) for g, e in zip(gradients, errors, strict=True))
        estimates.append(float(products.square().mean()) / 2)
    # Of logits, that of predictions at a temperature, as distillation measures it.
    measured = []
    for output, one, wanted in zip(outputs, disturbed, given, strict=True):
        t = TEMPERATURE if output.kind == "kl" else 1.0
        distance = output.distances(one / t, wanted.detach() / t).mean()
        measured.append(t**2 * float(distance))
    wanted = sum(measured) / len(measured)
    assert sum(estimates) / len(estimates) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("sureness", [0.1, 1.0, 10.0])
def test_drawn_gradients_are_on_average_as_large_as_without_a_temperature(sureness):
    torch.manual_seed(0)
    model = ready(small(), IMAGES)
    model.head.weight.data *= sureness
    images = pictures_of(3, count=64)
    sticks = yardstick(model, images, divergence="kl")
    logits = model(images).detach().requires_grad_()
    wanted = float((1 - logits.detach().softmax(1).square().sum(1)).sum())
    total, draws = 0.0, 200
    for loss in sticks.losses(logits, torch.Generator().manual_seed(1), draws):
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        total += float(gradient.square().sum()) / draws
    assert total == pytest.approx(wanted, rel=0.05)


def test_losses_of_a_network_that_is_sure_of_everything_are_not_nothing():
    model = ready(small(), IMAGES)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()[0] = 20.0
    (output,) = yardstick(model, divergence="kl").outputs
    assert output.scale == LEAST_SCALE
    logits = model(IMAGES).detach().requires_grad_()
    (loss,) = output.losses(logits, torch.Generator().manual_seed(0), 1)
    assert torch.autograd.grad(loss, logits)[0].abs().min() > 0


def test_fidelity_has_agreement_where_there_are_classes_and_errors_elsewhere():
    model, other = ready(Several(), IMAGES), ready(Several(), IMAGES)
    images = Calibration.of(IMAGES, batch=8)
    found = Wanted.of(model, images, yardstick(model)).compare(OutputsFor(other, images))
    assert found.images == len(IMAGES)
    assert found.agreement is not None
    assert found.kl > 0
    assert found.error > 0
    # Of three outputs one is logits.
    assert found.divergence == pytest.approx((found.kl + 2 * found.error) / 3)
    words = found.record().in_words()
    assert "of the dense network's classes, KL" in words
    assert "of the outputs' variance" in words
    same = Wanted.of(model, images, yardstick(model)).compare(OutputsFor(model, images))
    assert same.divergence == pytest.approx(0, abs=1e-6)
    assert same.agreement == 1

    maps = ready(UNet(3), IMAGES)
    found = Wanted.of(maps, images, yardstick(maps)).compare(OutputsFor(ready(UNet(3)), images))
    assert found.agreement is None
    assert found.record().in_words() == f"error {found.error:.2%} of the outputs' variance"
    assert found.divergence == found.error


def test_a_network_that_gives_no_numbers_is_the_farthest_there_is():
    model = small()
    broken = small()
    with torch.no_grad():
        broken.head.weight[0, 0] = torch.nan
    images = Calibration.of(IMAGES)
    found = Wanted.of(model, images).compare(OutputsFor(broken, images))
    assert found.divergence == float("inf")


def test_a_function_of_ones_own_judges_the_outputs_as_the_networks_give_them():
    seen = []

    def distance(found, wanted):
        seen.append((found, wanted))
        return (found.box - wanted.box).abs().mean()

    model, other = ready(Several(), IMAGES), ready(Several(), IMAGES)
    images = Calibration.of(IMAGES, batch=8)
    sticks = yardstick(model, divergence=distance)
    found = Wanted.of(model, images, sticks).compare(OutputsFor(other, images))
    assert all(isinstance(one, Found) for pair in seen for one in pair)
    with torch.no_grad():
        wanted = (other(IMAGES).box - model(IMAGES).box).abs().mean()
    assert found.divergence == pytest.approx(float(wanted), rel=1e-4)
    assert found.record().divergence == pytest.approx(found.divergence, abs=1e-6)
    assert f"divergence {found.divergence:.3g}" in found.record().in_words()


def test_outputs_too_large_to_be_kept_are_computed_for_each_comparison(monkeypatch):
    model, other = ready(UNet(3), IMAGES), ready(UNet(3))
    images = Calibration.of(IMAGES, batch=8)
    kept = Wanted.of(model, images, yardstick(model))
    monkeypatch.setattr("sbf_dist.compression.fitting.fidelity.HELD", 0)
    computed = Wanted.of(model, images, yardstick(model))
    for _ in range(2):
        found = [wanted.compare(OutputsFor(other, images)) for wanted in (kept, computed)]
        assert found[0] == found[1]


def test_auxiliary_outputs_in_training_are_left_out():
    @dataclass
    class Training:
        logits: torch.Tensor
        aux: torch.Tensor

    logits = torch.randn(2, 5)
    assert LOGITS.tensors(Training(logits, logits + 1))[0] is logits
    assert LOGITS.tensors(logits)[0] is logits
