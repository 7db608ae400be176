"""How long networks, and single layers in their possible forms, take on this machine."""

import copy
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.benchmark import Timer

from sbf_dist.layers import SBFConv2d

BLOCK = 1e-3  # seconds that a block of runs takes at least: long beside the clock's own overhead
BLOCKS = 5  # least number of blocks in a median
WARM_UP = 3  # runs


def latency(
    model: nn.Module, input_shape: tuple[int, int, int], *, batch: int = 1, seconds: float = 0.5
) -> float:
    """Measure the median milliseconds of a forward pass; see `latencies`."""
    (measured,) = latencies([model], input_shape, batch=batch, seconds=seconds)
    return measured


def latencies(
    models: Sequence[nn.Module],
    input_shape: tuple[int, int, int],
    *,
    batch: int = 1,
    seconds: float = 0.5,
) -> list[float]:
    """Measure the median milliseconds of a forward pass of each model, in eval mode.

    Every model runs on its own device and in its own dtype; images of `input_shape` (channels,
    height, width) come in channels_last; the threads are PyTorch's present number. Each model is
    measured for about `seconds` after a warm-up, in blocks by turns, so that a change of the
    machine's speed meets all of them alike.
    """
    timers = [_timer(model, input_shape, batch) for model in models]
    blocks: list[list[float]] = [[] for _ in timers]
    with torch.inference_mode():
        numbers = [max(1, math.ceil(BLOCK / timer.timeit(WARM_UP).median)) for timer in timers]
        spent = 0.0
        while spent < seconds * len(timers) or len(blocks[0]) < BLOCKS:
            for timer, number, found in zip(timers, numbers, blocks, strict=True):
                found.append(timer.timeit(number).median)
                spent += number * found[-1]
    return [1e3 * statistics.median(found) for found in blocks]


def _timer(model: nn.Module, input_shape: tuple[int, int, int], batch: int) -> Timer:
    parameter = next(model.parameters())
    shadow = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    images = torch.randn(batch, *input_shape, device=parameter.device, dtype=parameter.dtype)
    return Timer(
        "model(images)",
        globals={"model": shadow, "images": images.to(memory_format=torch.channels_last)},
        num_threads=torch.get_num_threads(),
    )


@dataclass(frozen=True)
class Form:
    """A way to build a convolution: B filters kept, S sources and m x m transformations.

    With no sources it is the dense convolution itself.
    """

    kept: int
    sources: int = 0
    transform_size: int = 1

    def __str__(self) -> str:
        if self.sources == 0:
            return "dense"
        return f"B={self.kept} S={self.sources} m={self.transform_size}"


def build_form(conv: nn.Conv2d, form: Form) -> nn.Module:
    """Return a layer of the shape of `conv` in another form, to be timed: its wiring is arbitrary.

    It has a bias, as every layer has whose batch norm is folded. `conv` must not be grouped.
    """
    if form.sources == 0:
        layer: nn.Conv2d | SBFConv2d = copy.deepcopy(conv)
    else:
        draw = random.Random(0)
        kept = sorted(draw.sample(range(conv.out_channels), form.kept))
        rebuilt = conv.out_channels - form.kept
        sources = [draw.sample(kept, form.sources) for _ in range(rebuilt)]
        layer = SBFConv2d.from_conv(conv, kept, sources, form.transform_size)
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(conv.out_channels).to(conv.weight))
    return layer


def layer_latencies(
    conv: nn.Conv2d,
    input_size: tuple[int, int],
    forms: Sequence[Form],
    *,
    batch: int = 1,
    seconds: float = 0.01,
) -> list[float]:
    """Measure the median milliseconds of each form of `conv` on images of (height, width)."""
    layers = [build_form(conv, form) for form in forms]
    return latencies(layers, (conv.in_channels, *input_size), batch=batch, seconds=seconds)
