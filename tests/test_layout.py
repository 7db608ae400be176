"""How images lie in memory is no matter of the user's code."""

import pytest
import torch
from small_networks import Small, pictures
from torch import nn

from sbf_dist.compression.holding_out import split
from sbf_dist.compression.one_shot import compress
from sbf_dist.compression.planning.latency import latency
from sbf_dist.compression.planning.latency_table import LatencyTable, Timing
from sbf_dist.compression.prepared_images import calibration_for
from sbf_dist.export.optimize import optimize
from sbf_dist.layout import contiguous, needs_contiguous, prefers_channels_last
from sbf_dist.train.evaluate import predict


class LeNet(nn.Module):
    """With the view of many tutorials: it wants features as nn.Conv2d gives them for NCHW."""

    def __init__(self, *, branch: bool = False, channels: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 5, padding=2)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 5 * 5, 5)
        self.branch = branch

    def forward(self, x):
        if self.branch and x.mean() > 1e6:  # which torch.fx cannot trace
            return self.fc(x)
        x = self.conv1(x).relu()
        x = torch.max_pool2d(self.conv2(x), 2).relu()
        x = self.norm(self.conv3(x)).relu()
        return self.fc(x.view(x.size(0), -1))


class Strided(LeNet):
    """Asks for strides itself."""

    def forward(self, x):
        x = torch.max_pool2d(self.conv2(self.conv1(x)), 2)
        x = self.norm(self.conv3(x))
        return self.fc(x.as_strided((x.shape[0], 400), (x.stride(0), 1)))


def network(kind=LeNet, **settings):
    torch.manual_seed(0)
    return kind(**settings).eval()


NETWORKS = [
    pytest.param(network(), id="traceable"),
    pytest.param(network(branch=True), id="not traceable"),
    pytest.param(network(Strided), id="asks for strides"),
]


@pytest.mark.parametrize("model", NETWORKS)
def test_an_optimized_network_computes_the_same(model):
    images = pictures(4)
    with torch.no_grad():
        wanted = model(images)
        torch.testing.assert_close(optimize(model)(images), wanted, rtol=1e-4, atol=1e-5)
    assert model.conv1.weight.is_contiguous()


def test_a_traceable_network_takes_channels_last_once_it_is_optimized():
    images = pictures(4)
    with torch.no_grad():
        given = optimize(network())(images.to(memory_format=torch.channels_last))
        torch.testing.assert_close(given, network()(images), rtol=1e-4, atol=1e-5)


def test_what_is_written_to_a_view_is_seen_where_the_network_reads_it():
    class Writing(LeNet):
        def forward(self, x):
            x = self.conv3(self.conv2(self.conv1(x)))
            x.view(x.size(0), -1).relu_()
            return x.mean((2, 3))

    model, images = network(Writing), pictures(4)
    with torch.no_grad():
        torch.testing.assert_close(optimize(model)(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", NETWORKS[:2])
def test_a_network_with_view_can_be_timed_and_evaluated(model):
    last = pictures(4).to(memory_format=torch.channels_last)
    assert needs_contiguous(model, last)
    assert latency(model, (3, 10, 10), seconds=0.01) > 0
    assert latency(optimize(model), (3, 10, 10), seconds=0.01) > 0
    found = predict(model, [{"id": torch.arange(4), "image": last}], "cpu")
    torch.testing.assert_close(found.probabilities, model(pictures(4)).softmax(1).detach())


@pytest.mark.parametrize("model", NETWORKS[:2])
def test_a_network_with_view_is_compressed_whatever_the_layout_of_the_images(model):
    last = pictures(64).to(memory_format=torch.channels_last)
    student, plan = compress(model, last, macs=0.8, name="lenet")
    assert plan.macs_after <= 0.8 * plan.macs_before
    with torch.no_grad():
        images = pictures(4)
        torch.testing.assert_close(optimize(student)(images), student(images), rtol=1e-4, atol=1e-5)


def test_a_budget_of_time_is_met_where_the_network_views(tmp_path):
    timing = Timing(LatencyTable(tmp_path / "latency.json"), optimize)
    _, plan = compress(network(), pictures(64), latency=1.0, name="lenet", timing=timing)
    assert plan.latency is not None


def test_images_of_one_channel_are_contiguous_by_their_strides_alone():
    model, images = network(channels=1), pictures(4)[:, :1].contiguous()
    last = images.to(memory_format=torch.channels_last)
    assert last.is_contiguous() and contiguous(last).stride() == images.stride()
    assert needs_contiguous(model, last) and not needs_contiguous(model, images)
    assert contiguous(images[:, :, :, 1:]).is_contiguous()


class Repeating(LeNet):
    """Makes images of three channels itself, which are contiguous however they come."""

    def forward(self, x):
        return super().forward(contiguous(x[:, :1].repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("model", "shape"),
    [(network(channels=1), (1, 10, 10)), (network(Repeating), (3, 10, 10))],
)
def test_a_network_with_view_whose_weights_alone_would_change_the_layout_is_timed(model, shape):
    assert latency(model, shape, seconds=0.01) > 0


def test_a_budget_of_time_is_met_where_a_network_views_images_of_one_channel(tmp_path):
    timing = Timing(LatencyTable(tmp_path / "latency.json"), optimize)
    images = pictures(64)[:, :1].contiguous()
    for given in (images, images.to(memory_format=torch.channels_last)):
        _, plan = compress(network(channels=1), given, latency=1.0, timing=timing)
        assert plan.latency is not None


def test_what_fails_either_way_is_not_for_the_layout_to_tell():
    last = torch.zeros(2, 4, 10, 10).to(memory_format=torch.channels_last)
    assert not needs_contiguous(network(), last)


class Depthwise(nn.Module):
    """A depthwise convolution behind a plain one."""

    def __init__(self, channels: int = 3):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.point(self.depthwise(self.stem(x)).relu()).mean((2, 3)))


class DepthwiseViewing(Depthwise):
    def forward(self, x):
        x = self.point(self.depthwise(self.stem(x)).relu())
        return self.head(x.view(len(x), -1).view(*x.shape).mean((2, 3)))


class DepthwiseByMemory(Depthwise):
    """What it computes depends on how its features lie in memory."""

    def forward(self, x):
        x = self.point(self.depthwise(self.stem(x)).relu())
        return self.head(x.as_strided(x.shape, (1600, 100, 10, 1))[:, :, :5].mean((2, 3)))


def in_layouts(model, images):
    """Layouts of the batches that `model` is compressed with: those to fit to, and held out."""
    parts = split(calibration_for(model.eval(), images))
    batches = [batch for part in parts for batch in [*part, *part.parts(5), part.first(3)]]
    return {batch.is_contiguous(memory_format=torch.channels_last) for batch in batches}


def test_depthwise_networks_are_fitted_in_channels_last():
    assert in_layouts(Depthwise(), pictures(16)) == {True}
    batches = [pictures(16)[:7], pictures(16)[7:]]
    assert in_layouts(Depthwise(), batches) == {True}


@pytest.mark.parametrize("kind", [DepthwiseViewing, DepthwiseByMemory])
def test_depthwise_networks_whose_code_asks_for_another_layout_are_not(kind):
    assert in_layouts(kind(), pictures(16)) == {False}


def test_depthwise_networks_are_asked_with_images_of_one_channel_in_channels_last():
    images = pictures(4)[:, :1].contiguous()
    assert prefers_channels_last(Depthwise(1).eval(), images)
    assert not prefers_channels_last(DepthwiseViewing(1).eval(), images)


def test_other_networks_get_images_as_they_come():
    assert in_layouts(network(Small), pictures(16)) == {False}
    last = pictures(16).to(memory_format=torch.channels_last)
    assert in_layouts(network(Small), last) == {True}


def test_a_student_fitted_in_channels_last_computes_what_it_would_else(monkeypatch):
    torch.manual_seed(0)
    model, images = Depthwise().eval(), pictures(64)
    student, plan = compress(model, images, macs=0.9)
    monkeypatch.setattr(
        "sbf_dist.compression.prepared_images.prefers_channels_last", lambda *_: False
    )
    other, same = compress(model, images, macs=0.9)
    assert {n: getattr(p, "kept", None) for n, p in plan.layers.items()} == {
        n: getattr(p, "kept", None) for n, p in same.layers.items()
    }
    with torch.no_grad():
        torch.testing.assert_close(student(images), other(images), rtol=1e-3, atol=1e-4)
