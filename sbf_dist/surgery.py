"""Copying networks, and exchanging modules of them."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from sbf_dist.hooks import take_hooks
from sbf_dist.layers import SBFConv2d
from sbf_dist.padding import PaddedConv2d, pad_of

M = TypeVar("M", bound=nn.Module)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside of DataParallel, torch.compile and the like, in any nesting.

    Where modules within the network are wrapped, it is a copy without their wrappers, so that
    names are those of the network itself.
    """
    while (inside := _inside(model)) is not None:
        model = inside
    if all(_inside(module) is None for module in model.modules()):
        return model
    plain = deep_copy(model)
    _unwrap_parts(plain)
    return plain


def _unwrap_parts(model: nn.Module) -> None:
    for name, part in model.named_children():
        inside = unwrapped(part)
        if inside is not part:
            setattr(model, name, inside)
        _unwrap_parts(inside)


def _inside(module: nn.Module) -> nn.Module | None:
    """Return what `module` wraps, or None if it is no wrapper."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
        return module.module
    # Its class is private to torch._dynamo, which takes a second to import.
    if type(module).__name__ == "OptimizedModule":
        return module._orig_mod  # type: ignore[return-value]
    return None


class _DetachedCopies(TorchFunctionMode):
    """Copies, while active, tensors with a history as detached ones, which PyTorch refuses to."""

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def deep_copy(module: M, shared: Iterable[Tensor] = ()) -> M:
    """Return a deep copy of `module`, also where it holds tensors that it computed from others.

    weight_norm, spectral_norm and pruning masks of torch.nn.utils keep such tensors: their hooks
    compute them anew in the next forward pass. Tensors in `shared` are not copied. Each module of
    the copy is in the mode of its original, and has its forward hooks.
    """
    with _DetachedCopies():
        copied = copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
    _set_modes(copied, {name: part.training for name, part in module.named_modules()})
    for name, part in module.named_modules():
        if isinstance(part, GraphModule):  # built anew, without what was registered
            take_hooks(copied.get_submodule(name), part)
    return copied


def in_eval_mode(module: M) -> M:
    """Put `module` in eval mode, in place; return it, whatever a `train` of its own returns."""
    module.eval()
    return module


def _set_modes(model: nn.Module, training: Mapping[str, bool]) -> None:
    """Put the modules of these names in their modes, each by itself.

    Traced networks are built anew when they are copied, and are in training mode then.
    """
    for name, part in model.named_modules():
        # torchvision's have a graph for each mode, which their `train` exchanges.
        if isinstance(part, GraphModule) and part.training != training.get(name, part.training):
            part.train(training[name])
    for name, part in model.named_modules():
        part.training = training.get(name, part.training)


def sharing_modules(model: nn.Module) -> dict[str, list[str]]:
    """Map each module that has a parameter of another module's to the names of these others."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    others: dict[str, list[str]] = {}
    for names in holders.values():
        for name in set(names) if len(set(names)) > 1 else ():
            others.setdefault(name, []).extend(other for other in names if other != name)
    return others


def become(module: nn.Module, other: nn.Module) -> None:
    """Turn `module` into `other`, in place, wherever a network holds it.

    Setting an attribute of the parent would leave the old module where it has a second name, or
    stands in a plain list. `other`, whose parts `module` takes over, must not be used afterwards.
    """
    module.__class__ = other.__class__
    module.__dict__.clear()
    module.__dict__.update(other.__dict__)


def with_convolutions(student: nn.Module) -> nn.Module:
    """Return a copy in which convolutions stand for SBF layers (see `to_convolution`).

    Its layers have the names, shapes and filters of the dense network's; its outputs are no use.
    """
    dense = deep_copy(student)
    for layer in list(dense.modules()):
        if isinstance(layer, SBFConv2d):
            become(layer, to_convolution(layer))
    return dense


@torch.no_grad()
def to_convolution(layer: SBFConv2d) -> nn.Conv2d:
    """Return the convolution of an SBF layer's shape with its basis filters, the others zero."""
    weight, pad = layer.basis.weight, pad_of(layer.basis)
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        groups=layer.groups,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        device=weight.device,
        dtype=weight.dtype,
    )
    conv.weight.zero_()
    conv.weight[list(layer.kept)] = weight
    if conv.bias is not None and layer.bias is not None:
        conv.bias.copy_(layer.bias)
    conv.weight.requires_grad_(weight.requires_grad)
    if pad is not None:
        conv = PaddedConv2d(conv, copy.deepcopy(pad))
    return conv.train(layer.training)
