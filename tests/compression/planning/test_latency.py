import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import Silent
from torch import nn

from sbf_dist.compression.planning import latency as timing
from sbf_dist.compression.planning.latency import (
    Form,
    build_form,
    latencies,
    latencies_if_quiet,
    latency,
    layer_latencies,
)
from sbf_dist.errors import UserError
from sbf_dist.layers import SBFConv2d


def test_a_network_is_measured_in_evaluation_mode_on_one_image():
    seen = []

    class Notes(nn.Conv2d):
        def forward(self, x):
            channels_last = x.is_contiguous(memory_format=torch.channels_last)
            seen.append((self.training, x.shape, x.dtype, channels_last, torch.is_grad_enabled()))
            return super().forward(x)

    model = nn.Sequential(Notes(3, 4, 3, dtype=torch.double)).train()
    assert latency(model, (3, 8, 9), seconds=0.01) > 0
    assert set(seen) == {(False, (1, 3, 8, 9), torch.double, True, False)}
    assert model.training


class FakeTimer:
    """Stands for torch.utils.benchmark.Timer: a run takes the seconds that the model holds."""

    clock = 0.0
    calls: list[nn.Module]

    def __init__(self, stmt, globals, num_threads):
        assert stmt == "model(images)"
        assert num_threads == torch.get_num_threads()
        self.model = globals["model"]

    def timeit(self, number):
        FakeTimer.calls.append(self.model)
        FakeTimer.clock += number * self.model.seconds
        return SimpleNamespace(median=self.model.seconds)


class Takes(nn.Linear):
    def __init__(self, seconds: float):
        super().__init__(1, 1)
        self.seconds = seconds


@pytest.fixture
def fake(monkeypatch):
    FakeTimer.clock, FakeTimer.calls = 0.0, []
    monkeypatch.setattr(timing, "Timer", FakeTimer)
    monkeypatch.setattr(timing, "_seconds_waited", lambda: 0.0)
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(timing.time, name, lambda: FakeTimer.clock)
    return FakeTimer


def test_models_are_measured_by_turns(fake):
    assert latencies([Takes(0.25), Takes(0.5)], (1, 1, 1)) == [250, 500]
    turns = [model.seconds for model in fake.calls[2:]]
    assert turns[:6] == [0.25, 0.5] * 3


def test_each_is_measured_for_as_long_as_asked_and_in_enough_blocks(fake):
    assert latencies([Takes(1e-5), Takes(0.3)], (1, 1, 1), seconds=0.1) == [0.01, 300]
    taken = [sum(model.seconds == s for model in fake.calls) for s in (1e-5, 0.3)]
    assert taken == [1 + 100, 1 + timing.BLOCKS]


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_blocks_in_which_threads_waited_are_left_out(disturbed):
    """A block is 30 times as long where another process has one of the processors."""
    pattern = [*disturbed, False]
    number_of_call = iter(range(10**6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "Timer", FakeTimer)
        FakeTimer.calls = []
        waited = [0.0]
        patch.setattr(timing, "_seconds_waited", lambda: waited[0])
        true = FakeTimer.timeit

        def timeit(self, number):
            if number != timing.WARM_UP and pattern[next(number_of_call) % len(pattern)]:
                waited[0] += 29 * number * self.model.seconds
                FakeTimer.clock += 29 * number * self.model.seconds
                return SimpleNamespace(median=30 * self.model.seconds)
            return true(self, number)

        patch.setattr(FakeTimer, "timeit", timeit)
        for name in ("monotonic", "perf_counter"):
            patch.setattr(timing.time, name, lambda: FakeTimer.clock)
        assert latency(Takes(1e-3), (1, 1, 1), seconds=0.01) == pytest.approx(1)


def test_a_machine_that_is_never_free_is_told_or_refused(fake, monkeypatch, caplog):
    monkeypatch.setattr(timing, "_seconds_waited", lambda: FakeTimer.clock)
    assert latency(Takes(0.5), (1, 1, 1)) == 500
    (warning,) = caplog.messages
    assert warning == "this machine is busy with other work: the latencies measured are too long"
    with pytest.raises(UserError, match="busy with other work: layers cannot be timed"):
        latencies([Takes(0.5)], (1, 1, 1), strict=True)
    assert latencies_if_quiet([Takes(0.5)], (1, 1, 1)) is None


def test_a_quiet_machine_gives_figures(fake):
    assert latencies_if_quiet([Takes(0.5), Takes(0.25)], (1, 1, 1)) == [500, 250]


def spin():
    while True:
        pass


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="no scheduler statistics")
def test_waiting_for_a_processor_is_seen():
    before = timing._seconds_waited()
    context = multiprocessing.get_context("fork")
    cpus = len(os.sched_getaffinity(0))
    others = [context.Process(target=spin, daemon=True) for _ in range(2 * cpus)]
    for other in others:
        other.start()
    end = time.monotonic() + 120
    try:
        while timing._seconds_waited() <= before:
            assert time.monotonic() < end
    finally:
        for other in others:
            other.kill()


@settings(max_examples=25, deadline=None)
@given(
    channels=st.integers(2, 9),
    kept=st.integers(1, 8),
    sources=st.integers(0, 4),
    size=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect"]),
    bias=st.booleans(),
)
def test_every_form_is_a_drop_in_with_a_bias(channels, kept, sources, size, stride, mode, bias):
    conv = nn.Conv2d(3, channels, 3, stride, 1, padding_mode=mode, bias=bias).eval()
    kept = min(kept, channels - 1)
    form = Form(kept, min(sources, kept), size)
    layer = build_form(conv, form)
    x = torch.randn(2, 3, 7, 8)
    assert layer(x).shape == conv(x).shape
    assert layer.bias is not None
    assert (conv.bias is not None) == bias
    if form.sources:
        assert isinstance(layer, SBFConv2d)
        assert layer.transforms.shape == (channels - kept, form.sources, size, size)
        assert str(form) == f"B={kept} S={form.sources} m={size}"
    else:
        assert type(layer) is nn.Conv2d
        assert str(form) == "dense"


def test_the_forms_of_a_layer_are_measured_at_its_input(monkeypatch):
    seen = []

    def measure(models, shape, **settings):
        seen.append((shape, settings["batch"], settings["strict"]))
        return [float(len(list(model.parameters()))) for model in models]

    monkeypatch.setattr(timing, "latencies", measure)
    conv = nn.Conv2d(3, 8, 3)
    assert layer_latencies(conv, (5, 6), [Form(8), Form(2, 1, 3)], batch=7) == [2, 3]
    assert seen == [((3, 5, 6), 7, True)]


def test_a_network_whose_train_returns_nothing_is_measured():
    assert latency(Silent(nn.Conv2d(3, 4, 3)), (3, 8, 9), seconds=0.01) > 0


class Video(nn.Module):
    """Weights of five axes beside those of four."""

    def __init__(self):
        super().__init__()
        self.frames, self.conv = nn.Conv3d(1, 4, 3, padding=1), nn.Conv2d(12, 8, 3)

    def forward(self, x):
        return self.conv(self.frames(x[:, None]).flatten(1, 2))


def test_a_network_with_weights_of_five_axes_is_measured():
    assert latency(Video(), (3, 8, 8), seconds=0.01) > 0
