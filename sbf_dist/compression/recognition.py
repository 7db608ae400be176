"""What a convolution computes, whatever its class: zero padding, then fixed filters.

Subclasses of nn.Conv2d pad like TensorFlow, standardise their weights, or have them computed by a
parametrisation or a hook. They are recognised by running them, not by their type, and an nn.Conv2d
that gives the same takes their place where they are converted.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from sbf_dist.errors import UserError
from sbf_dist.padding import PaddedConv2d, SamePadding
from sbf_dist.surgery import become, deep_copy

logger = logging.getLogger(__name__)

ROUNDING = 100  # epsilons of the type by which two ways to convolve may differ, of the largest
MOST_SIZES = 5  # of inputs that a padding is observed for: all remainders of strides up to 4

UNLIKE = "computes something else than zero padding and a convolution"

Amounts = tuple[int, int, int, int]  # of zeros on the left, right, top and bottom


@dataclass(frozen=True)
class Recognised:
    """An nn.Conv2d, or a PaddedConv2d, that gives what a convolution of another class gives.

    conv: the convolution itself where it is one of the two. own: whether its weight and bias are
    the convolution's own parameters, so that new ones can be put there. note: what changes where
    `conv` takes its place, in a few words.
    """

    conv: nn.Conv2d
    own: bool
    note: str | None = None


def is_plain(conv: nn.Conv2d) -> bool:
    """Return whether `conv` computes what nn.Conv2d or PaddedConv2d does, if it is a subclass."""
    kind = type(conv)
    return (
        kind.forward is nn.Conv2d.forward
        and kind._conv_forward in (nn.Conv2d._conv_forward, PaddedConv2d._conv_forward)
        and "weight" in conv._parameters  # or it is computed from others, by a parametrisation
    )


@torch.no_grad()
def recognise(conv: nn.Conv2d) -> Recognised | str:
    """Return what takes the place of `conv` in evaluation mode; why nothing can, if that is so.

    It is run alone, on noise of several sizes: as a padding may depend on its input's size.
    """
    if conv._forward_hooks or any(map(_is_foreign, conv._forward_pre_hooks.values())):
        return "its forward hooks (pruning masks or your own) would be lost"
    if is_plain(conv):
        return Recognised(conv, own=True)
    try:
        return _observe(conv)
    except _Unlike as unlike:
        return f"{type(conv).__name__} {unlike}"


class _Unlike(Exception):  # noqa: N818  (it is an answer)
    """What a convolution does that no padding and fixed filters do."""


def _observe(conv: nn.Conv2d) -> Recognised:
    """Return what takes the place of `conv`, a convolution of another kind, or raise _Unlike."""
    runs = _runs(conv)
    first = runs[0].call
    if any(not _alike(run.call, first) for run in runs):
        raise _Unlike("has filters that depend on its input")
    own = first.weight is conv._parameters.get("weight")
    own = own and first.bias is conv._parameters.get("bias")
    notes = [] if own else [f"the filters that {type(conv).__name__} computes are frozen"]
    made = _convolution(conv, first)
    if type(conv).forward is nn.Conv2d.forward:  # all but the weight is as its settings say
        _set_padding(made, conv.padding, conv.padding_mode)
        return Recognised(made, own=False, note=notes[0])
    pad = _rule([run.size for run in runs], [run.amounts() for run in runs], made)
    if isinstance(pad, tuple):
        _set_padding(made, pad)
    else:
        made = PaddedConv2d(made, pad)
        how = "by its input's size" if isinstance(pad, SamePadding) else "unevenly"
        notes.insert(0, f"padded {how}, as by {type(conv).__name__}")
    return Recognised(made, own=own, note="; ".join(notes) or None)


def as_plain(conv: nn.Conv2d) -> nn.Conv2d:
    """Return the convolution of `recognise`, which must have one."""
    known = recognise(conv)
    assert isinstance(known, Recognised), known
    return known.conv


def make_plain(conv: nn.Conv2d, name: str) -> nn.Conv2d:
    """Turn a convolution, in place, into what `recognise` gives; UserError if that is none."""
    known = recognise(conv)
    if isinstance(known, str):
        raise UserError(f"plan changes layer {name}, which must stay as it is: {known}")
    if known.conv is not conv:
        become(conv, known.conv)
    return conv


def make_all_plain(model: nn.Module) -> None:
    """Make every convolution of `model`, in place, an nn.Conv2d or PaddedConv2d, where that can be.

    Its parameters are then others than the network's own: for inference and measurements.
    """
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            known = recognise(module)
            if isinstance(known, Recognised) and known.conv is not module:
                become(module, known.conv)


def freeze(module: nn.Module) -> None:
    """Turn a convolution whose filters are computed from others, in place, into one that has them.

    Other modules, and those of which it is not known how, stay as they are.
    """
    if isinstance(module, nn.Conv2d):
        known = recognise(module)
        if isinstance(known, Recognised) and not known.own:
            become(module, known.conv)


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight that a convolution, or another layer, really multiplies by."""
    if isinstance(module, nn.Conv2d):
        known = recognise(module)
        if isinstance(known, Recognised) and not known.own:
            return known.conv.weight
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def is_same(known: Recognised, inputs: Tensor, outputs: Tensor) -> bool:
    """Whether `known` gives the outputs (N, C, H, W) that a convolution gave, but for rounding."""
    with torch.no_grad():
        found = known.conv(inputs)
    return found.shape == outputs.shape and _is_near(found, outputs)


def _is_near(found: Tensor, wanted: Tensor) -> bool:
    least = ROUNDING * torch.finfo(wanted.dtype).eps * wanted.abs().max()
    return bool((found - wanted).abs().max() <= least)  # also false for NaN


def _is_foreign(hook: Callable) -> bool:
    return not isinstance(hook, WeightNorm | SpectralNorm)


@dataclass(frozen=True)
class _Call:
    """What F.conv2d was called with."""

    inputs: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | str = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1


@dataclass(frozen=True)
class _Run:
    """What a convolution was given, and what it called."""

    given: Tensor
    call: _Call

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what it was given."""
        return self.given.shape[-2], self.given.shape[-1]

    def amounts(self) -> Amounts:
        """Return the zeros that the input was padded with in all."""
        left, right, top, bottom = _zeros_around(self.given, self.call.inputs)
        (above, below), (first, last) = _own_padding(self.call)
        return left + first, right + last, top + above, bottom + below


class _Calls(TorchFunctionMode):
    """Notes, while active, the calls of F.conv2d."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Call] = []

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is F.conv2d:
            named = dict(kwargs)
            if "input" in named:
                named["inputs"] = named.pop("input")
            self.found.append(_Call(*args, **named))
        return func(*args, **kwargs)


def _runs(conv: nn.Conv2d) -> list[_Run]:
    """Run a convolution on noise of several sizes."""
    training = [(module, module.training) for module in conv.modules()]
    conv.eval()
    try:
        if not next(conv.parameters()).is_meta:
            return _run_all(conv)
        real = deep_copy(conv).to_empty(device="cpu")
        # The padding does not depend on the weights, of which there are none.
        for tensor in [*real.parameters(), *real.buffers()]:
            nn.init.ones_(tensor)
        return _on_meta(conv, real, _run_all(real))
    finally:
        for module, was in training:
            module.training = was


def _run_all(conv: nn.Conv2d) -> list[_Run]:
    stride = _pair(conv.stride)
    like = next(conv.parameters())  # a weight that a hook computes is of before the last `.to`
    generator = torch.Generator().manual_seed(0)
    reach = [
        d * (k - 1) + 1 for d, k in zip(_pair(conv.dilation), conv.weight.shape[2:], strict=True)
    ]
    runs: list[_Run] = []
    refused: Exception | None = None
    for more in range(min(MOST_SIZES, max(stride) + 1)):
        height, width = (r + s + more for r, s in zip(reach, stride, strict=True))
        noise = torch.randn(2, conv.in_channels, height, width, generator=generator).to(like)
        try:
            with _Calls() as calls:
                outputs = conv(noise)
        except Exception as error:  # whatever its own code raises on a size that it does not take
            logger.debug("%s takes no input of %d x %d: %s", conv, height, width, error)
            refused = error
            continue
        if len(calls.found) != 1:
            raise _Unlike(f"convolves {len(calls.found)} times")
        (call,) = calls.found
        if not isinstance(outputs, Tensor) or not _is_result(call, outputs):
            raise _Unlike(UNLIKE)
        runs.append(_Run(noise, call))
    if not runs:
        why = " ".join(str(refused).split())
        raise _Unlike(f"cannot be run alone: {type(refused).__name__}: {why}")
    return runs


def _on_meta(conv: nn.Conv2d, real: nn.Conv2d, runs: list[_Run]) -> list[_Run]:
    """Put the parameters of `conv`, which have no values, for those of its copy `real`."""
    call = runs[0].call

    def of(tensor: Tensor | None) -> Tensor | None:
        for name, parameter in real._parameters.items():
            if parameter is tensor:
                return conv._parameters[name]
        return None if tensor is None else tensor.to("meta")

    weight, bias = of(call.weight), of(call.bias)
    assert weight is not None
    return [
        _Run(run.given, _Call(run.call.inputs, weight, bias, *_settings(run.call))) for run in runs
    ]


def _settings(call: _Call) -> tuple:
    return call.stride, call.padding, call.dilation, call.groups


def _is_result(call: _Call, outputs: Tensor) -> bool:
    wanted = F.conv2d(call.inputs, call.weight, call.bias, *_settings(call))
    return wanted.shape == outputs.shape and _is_near(outputs, wanted)


def _alike(one: _Call, other: _Call) -> bool:
    """Whether two calls have the same filters, stride, dilation and groups."""
    for a, b in ((one.weight, other.weight), (one.bias, other.bias)):
        if (a is None) != (b is None):
            return False
        if a is not None and b is not None and a is not b and not torch.equal(a, b):
            return False
    return _settings(one) == _settings(other)


def _zeros_around(given: Tensor, padded: Tensor) -> Amounts:
    """Return the numbers of zeros that were put around `given`, noise without zeros."""
    high, wide = (p - g for p, g in zip(padded.shape[-2:], given.shape[-2:], strict=True))
    for top in range(high + 1):
        for left in range(wide + 1):
            amounts = left, wide - left, top, high - top
            if torch.equal(F.pad(given, amounts), padded):
                return amounts
    raise _Unlike(UNLIKE)


def _own_padding(call: _Call) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return what F.conv2d pads itself: above and below, left and right."""
    if call.padding == "valid":
        return (0, 0), (0, 0)
    if call.padding == "same":
        sides = zip(_pair(call.dilation), call.weight.shape[2:], strict=True)
        first, second = (d * (k - 1) for d, k in sides)
        return (first // 2, first - first // 2), (second // 2, second - second // 2)
    assert not isinstance(call.padding, str)
    high, wide = _pair(call.padding)
    return (high, high), (wide, wide)


def _rule(
    sizes: list[tuple[int, int]], amounts: list[Amounts], conv: nn.Conv2d
) -> tuple[int, int] | nn.Module:
    """Return the padding, of both sides or as a module, that gives `amounts` for `sizes`."""
    left, right, top, bottom = amounts[0]
    if all(found == amounts[0] for found in amounts):
        if (left, top) == (right, bottom):
            return top, left
        return nn.ZeroPad2d(amounts[0])
    kernel, stride, dilation = (_pair(x) for x in (conv.kernel_size, conv.stride, conv.dilation))
    same = SamePadding(kernel, stride, dilation)
    if all(same.amounts(*size) == found for size, found in zip(sizes, amounts, strict=True)):
        return same
    raise _Unlike("pads by a rule that is not known")


def _set_padding(conv: nn.Conv2d, padding: Any, mode: Any = "zeros") -> None:
    """Give a convolution that was made without padding another."""
    template = nn.Conv2d(
        1,
        1,
        _pair(conv.kernel_size),
        padding=padding,
        dilation=_pair(conv.dilation),
        padding_mode=mode,
    )
    for key in ("padding", "padding_mode", "_reversed_padding_repeated_twice"):
        setattr(conv, key, getattr(template, key))


def _convolution(conv: nn.Conv2d, call: _Call) -> nn.Conv2d:
    """Build the convolution of a call, without padding, with copies of its filters."""
    outputs, inputs, *kernel = call.weight.shape
    made = nn.utils.skip_init(
        nn.Conv2d,
        inputs * call.groups,
        outputs,
        tuple(kernel),
        stride=_pair(call.stride),
        dilation=_pair(call.dilation),
        groups=call.groups,
        bias=call.bias is not None,
        device=call.weight.device,
        dtype=call.weight.dtype,
    )
    trained = any(parameter.requires_grad for parameter in conv.parameters())
    made.weight = nn.Parameter(call.weight.detach().clone(), requires_grad=trained)
    if call.bias is not None:
        made.bias = nn.Parameter(call.bias.detach().clone(), requires_grad=trained)
    return made.train(conv.training)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, *rest = value
    return first, rest[0] if rest else first
