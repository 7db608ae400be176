"""How long networks, and single layers in their possible forms, take on this machine."""

import logging
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sbf_dist.compression.recognition import as_plain
from sbf_dist.errors import UserError
from sbf_dist.layers import SBFConv2d
from sbf_dist.layout import can_take, lay_out_in_channels_last
from sbf_dist.surgery import deep_copy, in_eval_mode

# It loads a module that warns of a CUDA toolkit without a GPU, which is no fault.
_LOADED_BY_TIMER = logging.getLogger("torch.utils.cpp_extension")
_LOADED_BY_TIMER.disabled = True
from torch.utils.benchmark import Timer  # noqa: E402

_LOADED_BY_TIMER.disabled = False

logger = logging.getLogger(__name__)

BLOCK = 1e-3  # seconds that a block of runs takes at least: long beside the clock's own overhead
BLOCKS = 5  # least number of blocks in a median
WARM_UP = 3  # runs
# Share of a block's time that threads may have waited for a processor. Where two threads share a
# layer and one of them is not running, the other waits for it: a layer of 0.6 ms was seen to take
# 30 ms beside one busy process.
UNDISTURBED = 0.05
PATIENCE = 2.0  # seconds for each model in which enough undisturbed blocks should be found


class MachineBusyError(UserError):
    """Threads had to wait for a processor whenever something was timed."""


def latency(
    model: nn.Module, input_shape: tuple[int, ...], *, batch: int = 1, seconds: float = 0.5
) -> float:
    """Measure the median milliseconds of a forward pass; see `latencies`."""
    (measured,) = latencies([model], input_shape, batch=batch, seconds=seconds)
    return measured


def latencies(
    models: Sequence[nn.Module],
    input_shape: tuple[int, ...],
    *,
    batch: int = 1,
    seconds: float = 0.5,
    strict: bool = False,
) -> list[float]:
    """Measure the median milliseconds of a forward pass of each model, in eval mode.

    Every model runs on its own device and in its own dtype; images of `input_shape` (channels,
    height, width) come in channels_last, or contiguous where a model's own code needs that; the
    threads are PyTorch's present number. Otherwise as `timed`.
    """
    timers = [_timer(model, input_shape, batch) for model in models]
    return timed(timers, seconds=seconds, strict=strict)


def timed(timers: Sequence[Timer], *, seconds: float = 0.5, strict: bool = False) -> list[float]:
    """Measure the median milliseconds of a run of each timer.

    Each is measured for about `seconds` after a warm-up, in blocks by turns, so that a change of
    the machine's speed meets all of them alike. Blocks in which our threads had to wait for a
    processor are left out; where there is no other within PATIENCE, a warning says so and the least
    disturbed are used, or, if `strict`, MachineBusyError is raised.
    """
    blocks: list[list[_Block]] = [[] for _ in timers]
    with torch.inference_mode():
        numbers = [max(1, math.ceil(BLOCK / timer.timeit(WARM_UP).median)) for timer in timers]
        end = time.monotonic() + (PATIENCE + 2 * seconds) * len(timers)
        unfinished = list(range(len(timers)))
        while unfinished and time.monotonic() < end:
            for index in unfinished:
                blocks[index].append(_run_block(timers[index], numbers[index]))
            unfinished = [
                index
                for index in unfinished
                if _undisturbed(blocks[index]) < BLOCKS
                or numbers[index] * sum(block.seconds for block in blocks[index]) < seconds
            ]
    if min(map(_undisturbed, blocks)) == 0:
        busy = "this machine is busy with other work"
        if strict:
            raise MachineBusyError(f"{busy}: layers cannot be timed; try again when it is not")
        logger.warning("%s: the latencies measured are too long", busy)
    return [1e3 * _median(found) for found in blocks]


def latencies_if_quiet(
    models: Sequence[nn.Module], input_shape: tuple[int, ...], *, batch: int = 1
) -> list[float] | None:
    """Measure as `latencies` does; None if the machine is too busy for figures."""
    try:
        return latencies(models, input_shape, batch=batch, strict=True)
    except MachineBusyError:
        return None


@dataclass(frozen=True)
class _Block:
    """Seconds of one run in a block, and the share of the block that threads waited."""

    seconds: float
    waited: float


def _run_block(timer: Timer, number: int) -> _Block:
    waited, start = _seconds_waited(), time.perf_counter()
    seconds = timer.timeit(number).median
    elapsed = time.perf_counter() - start
    return _Block(seconds, (_seconds_waited() - waited) / elapsed)


def _undisturbed(blocks: list[_Block]) -> int:
    return sum(block.waited <= UNDISTURBED for block in blocks)


def _median(blocks: list[_Block]) -> float:
    """Median of the undisturbed blocks, or, without any, of the BLOCKS least disturbed."""
    ranked = sorted(blocks, key=lambda block: block.waited)
    return statistics.median(b.seconds for b in ranked[: _undisturbed(blocks) or BLOCKS])


def _seconds_waited() -> float:
    """Seconds that the threads of this process were ready to run but had no processor, ever.

    From /proc (Linux, kernel documentation, scheduler/sched-stats); 0 where it is missing, and
    then every block counts as undisturbed.
    """
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has ended
    return total / 1e9


def _timer(model: nn.Module, input_shape: tuple[int, ...], batch: int) -> Timer:
    parameter = next(model.parameters())
    shadow = in_eval_mode(deep_copy(model))
    images = torch.randn(batch, *input_shape, device=parameter.device, dtype=parameter.dtype)
    if images.ndim == 4:  # inputs that are packed lie as they do
        lay_out_in_channels_last(shadow)
        last = images.to(memory_format=torch.channels_last)
        if can_take(shadow, last):
            images = last
        else:
            shadow = in_eval_mode(deep_copy(model))
    return Timer(
        "model(images)",
        globals={"model": shadow, "images": images},
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

    It has a bias, as every layer has whose batch norm is folded.
    """
    conv = as_plain(conv)
    if form.sources == 0:
        layer: nn.Conv2d | SBFConv2d = deep_copy(conv)
    else:
        draw = random.Random(0)
        groups, width = conv.groups, conv.out_channels // conv.groups
        kept = [
            group * width + channel
            for group in range(groups)
            for channel in sorted(draw.sample(range(width), form.kept // groups))
        ]
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
    """Measure the median milliseconds of each form of `conv` on images of (height, width).

    Raises UserError if the machine is too busy for that: these numbers are kept.
    """
    layers = [build_form(conv, form) for form in forms]
    shape = (conv.in_channels, *input_size)
    return latencies(layers, shape, batch=batch, seconds=seconds, strict=True)
