"""Which channels of a network must go together, as torch-pruning's dependency graph finds them.

Every group that the graph gives is tried out before it is believed: with some of its channels cut
off, the network must compute what it computes when nothing reads them.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sbf_dist.compression.named_outputs import named_tensors
from sbf_dist.compression.narrow import cannot_narrow, is_depthwise, narrow
from sbf_dist.compression.plan import Removed
from sbf_dist.compression.recognition import freeze
from sbf_dist.errors import UserError
from sbf_dist.surgery import deep_copy, in_eval_mode, sharing_modules

TRIALS = 3  # of a group: with one, channels may fit by chance
TOLERANCE = 1e-8  # of the largest output, in double precision


@dataclass(frozen=True)
class Part:
    """What the channels of a group are in one module.

    channels[i] are the numbers there of the group's channel i: several, for instance, in a linear
    layer that reads flattened feature maps. side is 'inp' where they are read, and 'out' where
    they are computed or passed on (normalisations, depthwise convolutions).
    """

    name: str
    side: Literal["out", "inp"]
    channels: list[list[int]]


@dataclass(frozen=True)
class Coupled:
    """A group of channels each of which can only be removed from all parts at once."""

    name: str  # of the first layer that makes them
    parts: list[Part]

    @property
    def size(self) -> int:
        """Return the number of channels."""
        return len(self.parts[0].channels)


def find_coupled(model: nn.Module, images: Tensor) -> tuple[list[Coupled], dict[str, str]]:
    """Return all groups of channels that can be removed, and why each other layer's cannot.

    `images` (N, C, H, W): two or more, of the size that the network will see. A network that
    torch-pruning fails on has no groups, and '' among the reasons says how it failed.
    """
    import torch_pruning as tp  # takes seconds, and a planned network is loaded without it

    shadow = _shadow(model)
    example = images[:2].double()
    names = {module: name for name, module in shadow.named_modules()}
    graph = tp.DependencyGraph()
    try:
        with torch.enable_grad():
            graph.build_dependency(
                shadow,
                example,
                forward_fn=lambda network, x: list(named_tensors(network(x)).values()),
                verbose=False,
            )
            found = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
    except Exception as error:  # whatever a foreign tracer meets in a foreign network
        message = " ".join(str(error).split())[:200]
        return [], {"": f"torch-pruning cannot follow it: {type(error).__name__}: {message}"}
    shared = sharing_modules(shadow)
    groups: list[Coupled] = []
    reasons: dict[str, str] = {}
    for group in found:
        name = names[group[0].dep.target.module]
        parts: dict[tuple[str, str], Part] = {}
        reason: str | None = None
        for item in group.items:
            node, module = item.dep.target, item.dep.target.module
            if node.type == tp.ops.OPTYPE.OUTPUT:
                reason = reason or "it computes the network's output"
            elif isinstance(module, nn.Parameter):
                reason = reason or "a parameter outside any layer has its channels"
            elif module in names and len(list(module.parameters())) > 0:
                unfit = _unfit(module, shared.get(names[module]))
                if unfit is not None:
                    place = (
                        "it is" if names[module] == name else f"its channels reach {names[module]},"
                    )
                    reason = reason or f"{place} {unfit}"
                part = _part(names[module], module, graph, item, group[0].idxs)
                parts[part.name, part.side] = part
        readers = [part for part in parts.values() if part.side == "inp"]
        if reason is None and not readers:
            reason = "nothing but the network's output reads it"
        if reason is None:
            groups.append(Coupled(name, list(parts.values())))
        else:
            reasons[name] = reason
    faulty: dict[str, str] = {}
    if _fault(shadow, groups, example) is not None:
        faulty = _faulty(shadow, groups, example)
        groups = [group for group in groups if group.name not in faulty]
        if _fault(shadow, groups, example) is not None:  # only together
            faulty |= {group.name: "the groups cannot be followed together" for group in groups}
            groups = []
    return groups, reasons | faulty


def _unfit(module: nn.Module, sharing: list[str] | None) -> str | None:
    """Say what `module`, whose weights modules of `sharing` use too, is that it cannot be cut."""
    if sharing is not None:
        return f"a layer whose weights are also those of {sharing[0]}"
    return cannot_narrow(module)


def removed_channels(chosen: list[tuple[Coupled, list[int]]]) -> dict[str, Removed]:
    """Return what each module loses when of each group the listed channels are removed."""
    numbers: dict[str, dict[str, set[int]]] = {}
    for group, channels in chosen:
        for part in group.parts:
            sides = numbers.setdefault(part.name, {"out": set(), "inp": set()})
            for channel in channels:
                sides[part.side].update(part.channels[channel])
    return {
        name: Removed(out=sorted(sides["out"]), inp=sorted(sides["inp"]))
        for name, sides in numbers.items()
        if sides["out"] or sides["inp"]
    }


@torch.no_grad()
def silence(model: nn.Module, removed: dict[str, Removed]) -> None:
    """Let nothing read the channels of `removed`, in place: the weights that do become zero."""
    for name, channels in removed.items():
        if channels.inp:
            module = model.get_submodule(name)
            weight = module.get_parameter("weight").clone()
            weight[:, channels.inp] = 0.0
            module.register_parameter("weight", nn.Parameter(weight))


def _part(name: str, module: nn.Module, graph, item, roots: list[int]) -> Part:
    """Translate one item of a group of torch-pruning, whose root's channels are `roots`."""
    one_width = not isinstance(module, nn.Conv2d | nn.Linear) or is_depthwise(module)
    out = one_width or graph.is_out_channel_pruning_fn(item.dep.handler)
    channels: dict[int, list[int]] = {root: [] for root in roots}
    for number, root in zip(item.idxs, item.root_idxs, strict=True):
        channels[root].append(number)
    return Part(name, "out" if out else "inp", [sorted(channels[root]) for root in roots])


@torch.no_grad()
def _shadow(model: nn.Module) -> nn.Module:
    """Copy `model` in double precision with random weights.

    Trained weights may hide what belongs together: a branch that ends in a batch norm of zeros
    says nothing.
    """
    shadow = in_eval_mode(deep_copy(model)).double()
    for module in list(shadow.modules()):
        freeze(module)  # as `narrow` does: filters that are computed hide what they consist of
    generator = torch.Generator().manual_seed(0)
    for tensor in [*shadow.parameters(), *shadow.buffers()]:
        if tensor.is_floating_point():
            if tensor.ndim > 1:
                values = torch.randn(tensor.shape, generator=generator, dtype=torch.double)
                values /= math.sqrt(max(1, tensor[0].numel()))
            else:
                values = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.double)
            tensor.copy_(values)
    for parameter in shadow.parameters():
        parameter.requires_grad_()
    return shadow


def _faulty(shadow: nn.Module, groups: list[Coupled], images: Tensor) -> dict[str, str]:
    """Return the groups, by name, that are not what they seem; found by halving."""
    fault = _fault(shadow, groups, images)
    if fault is None:
        return {}
    if len(groups) == 1:
        return {groups[0].name: fault}
    half = len(groups) // 2
    return _faulty(shadow, groups[:half], images) | _faulty(shadow, groups[half:], images)


def _fault(shadow: nn.Module, groups: list[Coupled], images: Tensor) -> str | None:
    """Cut random channels of all groups; say what is wrong with what is left, if it ever is."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(TRIALS):
        removed = removed_channels(
            [
                (group, torch.randperm(group.size, generator=generator)[: group.size // 2].tolist())
                for group in groups
            ]
        )
        fault = _difference(shadow, removed, images)
        if fault is not None:
            return fault
    return None


@torch.no_grad()
def _difference(shadow: nn.Module, removed: dict[str, Removed], images: Tensor) -> str | None:
    """Say what is wrong with `shadow` without `removed`, if anything is."""
    narrowed, silenced = _with_the_same_tensors(shadow), _with_the_same_tensors(shadow)
    try:
        narrow(narrowed, removed)
        outputs = named_tensors(narrowed(images))
    except (UserError, RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())[:200]
        return f"torch-pruning's graph does not fit it: {message}"
    silence(silenced, removed)
    expected = named_tensors(silenced(images))
    for name, wanted in expected.items():
        output = outputs[name]
        if output.shape != wanted.shape:
            return "torch-pruning's graph does not fit it: an output changes its shape"
        # Also false for NaN.
        if not wanted.numel() or (output - wanted).abs().max() <= TOLERANCE * wanted.abs().max():
            continue
        return (
            "its channels are not independent of each other, or torch-pruning's graph does not "
            "fit it: without them the network computes other than if nothing read them"
        )
    return None


def _with_the_same_tensors(model: nn.Module) -> nn.Module:
    """Copy the modules of `model` but not their tensors, which are large."""
    return deep_copy(model, [*model.parameters(), *model.buffers()])
