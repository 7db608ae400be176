"""Which convolutions of a network can become SBF layers, and why the others cannot."""

import difflib
import fnmatch
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sbf_dist.compression.inputs import input_shapes, packing_of
from sbf_dist.compression.named_outputs import counted, run_on
from sbf_dist.compression.recognition import UNLIKE, Recognised, is_same, recognise
from sbf_dist.errors import UserError
from sbf_dist.hooks import on_output, registered
from sbf_dist.layers import SBFConv2d
from sbf_dist.surgery import sharing_modules

LARGEST_GRAM = 4608  # shifted channels in a layer's Gram matrix: 512 channels with m = 3
# Of all convolutions' multiply-adds: what a layer on a 1 x 1 map must cost to be worth fitting.
NEGLIGIBLE = 0.01


@dataclass
class Use:
    """How one forward pass uses a convolution.

    calls: how often; macs: multiply-adds per image, all calls; input_shape, output_shape: of one
    image, in the last call; argument: what it is given by keyword, but for `input`; matters:
    whether an output that counts depends on the layer's; is_read: whether code outside of the layer
    looks at its weight; known: what can take its place, or why nothing can; is_as_known: whether
    that gives what the layer gives on the images.
    """

    known: Recognised | str

    calls: int = 0
    macs: int = 0
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    argument: str | None = None
    matters: bool = False
    is_read: bool = False
    is_as_known: bool = True


class _Readers(TorchFunctionMode):
    """Notes, while active, the convolutions whose weights are read while they do not run."""

    def __init__(self, convolutions: dict[str, nn.Conv2d]) -> None:
        super().__init__()
        self.names = {
            id(parameter): name
            for name, conv in convolutions.items()
            for parameter in conv.parameters()
            if parameter is not conv.bias
        }
        self.running: str | None = None
        self.read: set[str] = set()

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            name = self.names.get(id(value))
            if name is not None and name != self.running:
                self.read.add(name)
        return func(*args, **kwargs)


def uses(model: nn.Module, images: Tensor, counting: Sequence[str] | None = None) -> dict[str, Use]:
    """Observe the convolutions of `model` in a forward and a backward pass.

    The first two of `images` (N, C, H, W) are used; names in the order in which the forward pass
    reaches them. `counting` are the outputs that count, None all of floating type (`counted`).
    Raises UserError if the network has no convolution, cannot take the images, or gives nothing
    that counts.
    """
    _check_images(model, images)
    names = {n: module for n, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if not names:
        raise UserError(f"model {type(model).__name__} has no convolution (nn.Conv2d)")
    known = {name: recognise(conv) for name, conv in names.items()}
    found: dict[str, Use] = {}
    outputs: dict[str, Tensor] = {}
    filter_costs = {name: conv.weight[0].numel() for name, conv in names.items()}
    readers = _Readers(names)
    arguments: dict[str, str | None] = {}

    def begin(name: str) -> Callable[..., None]:
        def hook(_: nn.Conv2d, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            readers.running = name
            arguments[name] = next((key for key in kwargs if args or key != "input"), None)

        return hook

    def observe(name: str) -> Callable[..., Tensor]:
        def hook(conv: nn.Conv2d, given: Tensor, output: Tensor) -> Tensor:
            use = found.setdefault(name, Use(known[name]))
            readers.running = None
            if isinstance(use.known, Recognised) and use.known.conv is not conv:
                use.is_as_known = use.is_as_known and is_same(use.known, given, output)
            use.calls += 1
            use.argument = use.argument or arguments[name]
            use.macs += output[0].numel() * filter_costs[name]
            use.input_shape, use.output_shape = tuple(given.shape[1:]), tuple(output.shape[1:])
            outputs[name] = output
            return output.clone()  # which an activation may overwrite in place

        return hook

    # First of all: hooks of the layer's own may read its weight.
    before = (
        conv.register_forward_pre_hook(begin(name), prepend=True, with_kwargs=True)
        for name, conv in names.items()
    )
    after = (on_output(conv, observe(name)) for name, conv in names.items())
    with registered(before), registered(after), torch.enable_grad(), readers:
        outcome = run_on(model, images[:2].detach().requires_grad_())
    tensors = counted(model, outcome, len(images[:2]), counting)
    learnt = [tensor for tensor in tensors.values() if tensor.requires_grad]
    for name in readers.read & found.keys():
        found[name].is_read = True
    # Where nothing at all has a gradient the network detaches its outputs: nothing in it matters.
    reached = [name for name in found if outputs[name].requires_grad]
    if reached and learnt:
        gradients = torch.autograd.grad(
            learnt,
            [outputs[name] for name in reached],
            grad_outputs=[torch.ones_like(tensor) for tensor in learnt],
            allow_unused=True,
        )
        for name, gradient in zip(reached, gradients, strict=True):
            found[name].matters = gradient is not None
    return found


def _check_images(model: nn.Module, images: Tensor) -> None:
    if (images.ndim != 4 and packing_of(model) is None) or len(images) == 0:
        raise UserError(
            f"calibration images have shape {tuple(images.shape)}: expected (N, channels, "
            "height, width) with N > 0"
        )
    if not images.is_floating_point():
        raise UserError(f"calibration images are {images.dtype}: expected floats, normalised")


def forward_order(model: nn.Module, images: Tensor) -> list[str]:
    """Names of the convolutions of `model` in the order in which a forward pass reaches them."""
    return list(uses(model, images))


def find_candidates(
    model: nn.Module,
    images: Tensor,
    transform_size: int,
    keep: Sequence[str] = (),
    counting: Sequence[str] | None = None,
) -> tuple[dict[str, str], list[str]]:
    """Split the convolutions into those left dense, with the reason, and those to convert.

    `model` is in eval mode; `images` (N, C, H, W) and `counting` as for `uses`. Layers whose names
    match a pattern of `keep` (`fnmatch`, e.g. "layer1.*") stay dense. Both results are in forward
    order; layers that no forward pass reaches are in neither. Raises UserError as `uses` does, and
    for a pattern that matches no convolution.
    """
    found = uses(model, images, counting)
    kept = kept_dense(model, keep)
    shared = sharing_modules(model)
    total = sum(use.macs for use in found.values())
    reasons: dict[str, str] = {}
    candidates: list[str] = []
    for name, use in found.items():
        conv = convolution(model, name)
        reason = (
            kept.get(name)
            or _by_sharing(name, shared)
            or _as_a_module(conv, use)
            or _by_its_use(use, input_shapes(model, images))
            or _by_its_cost(conv, use, total, transform_size)
        )
        if not reason:
            candidates.append(name)
        else:
            reasons[name] = reason
    return reasons, candidates


def kept_dense(model: nn.Module, keep: Sequence[str]) -> dict[str, str]:
    """Map the convolutions that match a pattern of `keep` to the reason to leave them dense.

    Raises UserError for a pattern without a match, with the nearest name.
    """
    names = [n for n, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    kept: dict[str, str] = {}
    for pattern in keep:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            inside = f"{pattern.rstrip('.')}."
            nearest = next(
                (f"{inside}*" for name in names if name.startswith(inside)),
                difflib.get_close_matches(pattern, names, n=1, cutoff=0)[0],
            )
            raise UserError(
                f"keep pattern {pattern!r} matches no convolution; did you mean {nearest!r}?"
            )
        for name in matches:
            kept.setdefault(name, f"kept dense, as requested by {pattern!r}")
    return kept


def _by_sharing(name: str, shared: dict[str, list[str]]) -> str | None:
    """Name the other users of a layer's weight, which may lie in a parametrisation."""
    own = f"{name}."
    others = dict.fromkeys(
        other
        for part, users in shared.items()
        if part == name or part.startswith(own)
        for other in users
        if not other.startswith(own)
    )
    if not others:
        return None
    return f"its weight is also that of {', '.join(others)}: all of them stay as they are"


def _as_a_module(conv: nn.Conv2d, use: Use) -> str | None:
    if isinstance(use.known, str):
        return use.known
    if not use.is_as_known:
        return f"{type(conv).__name__} {UNLIKE}"
    if conv.groups == conv.in_channels > 1:
        return "depthwise convolution: a filter costs no more than rebuilding a channel"
    if conv.groups == conv.out_channels > 1:
        return f"its {conv.groups} groups have one channel each: none to rebuild it from"
    if conv.out_channels == 1:
        return "it has one channel: there is no other to rebuild it from"
    return None


def _by_its_use(use: Use, shapes: Collection[tuple[int, ...]]) -> str | None:
    if use.calls > 1:
        return f"used {use.calls} times in a forward pass: one fit cannot serve different inputs"
    if use.is_read:
        return "its weight is read by another module, and an SBF layer does not have it"
    if use.argument is not None:
        return f"it is called with {use.argument} = …, and an SBF layer has no such argument"
    if not use.matters:
        return "no gradient reaches it from an output that counts: its importance is unknown"
    # The channels alone would not do: squeeze-and-excitation may have the same number.
    if use.input_shape in shapes:
        return "the stem: it reads the image itself"
    return None


def _by_its_cost(conv: nn.Conv2d, use: Use, total: int, transform_size: int) -> str | None:
    filter_cost = conv.weight[0].numel()
    size = size_for(conv, transform_size)
    if filter_cost <= size**2:
        return (
            f"a filter costs {filter_cost} multiply-adds, rebuilding a channel at least {size**2}"
        )
    if math.prod(use.output_shape[1:]) == 1 and use.macs < NEGLIGIBLE * total:
        return (
            "its map is 1 x 1 (squeeze-and-excitation or a head): less than "
            f"{NEGLIGIBLE:.0%} of the multiply-adds, and an image is one position to fit to"
        )
    return None


def convolution(model: nn.Module, name: str) -> nn.Conv2d:
    conv = model.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    return conv


def size_for(conv: nn.Conv2d | SBFConv2d, transform_size: int) -> int:
    """Return the transformations' size in a layer: 1 where the layer is too wide to fit more."""
    return transform_size if conv.out_channels * transform_size**2 <= LARGEST_GRAM else 1


def filter_macs(conv: nn.Conv2d, layer_macs: int) -> tuple[float, float]:
    """Multiply-adds of one filter, and of one tap of a transformation, over the whole output."""
    per_filter = layer_macs / conv.out_channels
    return per_filter, per_filter / conv.weight[0].numel()
