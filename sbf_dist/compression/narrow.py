"""Removing channels from a network's modules, as a plan lists them.

The list itself says what belongs together; nothing is traced and no image is needed.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

from sbf_dist.compression.dry_run import dry_run
from sbf_dist.compression.inputs import Packing
from sbf_dist.compression.plan import Removed
from sbf_dist.compression.recognition import Recognised, freeze, recognise
from sbf_dist.errors import UserError
from sbf_dist.surgery import deep_copy

# Of each kind of module: the attributes that hold its numbers of output and of input channels.
# The normalisations and PReLU have one number for both.
WIDTHS: dict[type[nn.Module], tuple[str, str]] = {
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.Linear: ("out_features", "in_features"),
    _BatchNorm: ("num_features", ""),
    _InstanceNorm: ("num_features", ""),
    nn.GroupNorm: ("num_channels", ""),
    nn.LayerNorm: ("normalized_shape", ""),
    nn.PReLU: ("num_parameters", ""),
}
TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def narrow(model: nn.Module, removed: dict[str, Removed]) -> None:
    """Cut the channels that `removed` lists by module name off `model`, in place.

    Raises UserError in one line if a module is missing, of a kind that cannot be cut, or does not
    have the channels.
    """
    modules = dict(model.named_modules())
    for name, channels in removed.items():
        if name not in modules:
            raise UserError(f"plan removes channels of {name}, which this network does not have")
        narrow_module(modules[name], name, channels)


@torch.no_grad()
def narrow_module(module: nn.Module, name: str, channels: Removed) -> None:
    """Cut `channels` off one module in place; UserError, naming `name`, if that is impossible.

    Filters that a convolution computes from others become constants.
    """
    reason = cannot_narrow(module)
    if reason is not None:
        raise UserError(f"plan removes channels of {name}, {reason}")
    freeze(module)
    kind = next(kind for kind in WIDTHS if isinstance(module, kind))
    out_width, in_width = WIDTHS[kind]
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        in_width = ""
    if channels.inp and not in_width:
        raise UserError(
            f"plan removes input channels of {name}, a {type(module).__name__} whose input and "
            "output channels are the same: list them under out"
        )
    if channels.out:
        width = _width(module, out_width)
        left = _remaining(name, "channel", channels.out, width)
        for key, tensor in _own_tensors(module).items():
            if tensor.ndim:  # which the count of batches has not
                _replace(module, key, tensor, left, 0)
        _set_width(module, out_width, len(left))
        if isinstance(module, nn.Conv2d) and module.groups > 1:  # depthwise
            module.in_channels = module.groups = len(left)
    if channels.inp:
        left = _remaining(name, "input channel", channels.inp, _width(module, in_width))
        _replace(module, "weight", module.get_parameter("weight"), left, 1)
        _set_width(module, in_width, len(left))


def cannot_narrow(module: nn.Module) -> str | None:
    """Return why the channels of `module` cannot be removed, or None if they can."""
    kind = type(module).__name__
    if not isinstance(module, tuple(WIDTHS)):
        return f"a {kind}: it has no channels that can be cut"
    known = recognise(module) if isinstance(module, nn.Conv2d) else None
    unknown = sorted(_own_tensors(module).keys() - TENSORS)
    is_frozen = isinstance(known, Recognised) and not known.own
    if (unknown or is_parametrized(module)) and not is_frozen:
        return f"a {kind} with tensors of its own ({', '.join(unknown) or 'parametrizations'})"
    if isinstance(module, nn.Conv2d) and module.groups > 1 and not is_depthwise(module):
        return f"a grouped convolution ({module.groups} groups): its groups would become unequal"
    if isinstance(module, nn.GroupNorm) and module.num_groups not in (1, module.num_channels):
        return f"a GroupNorm of {module.num_groups} groups, which would become unequal"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return f"a LayerNorm over {len(module.normalized_shape)} dimensions"
    return None


def is_depthwise(module: nn.Module) -> bool:
    """Whether each output channel of a convolution reads the one input channel of its number."""
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
    )


def check_fits(
    model: nn.Module, input_shape: tuple[int, int, int], packing: Packing | None = None
) -> None:
    """Run `model` on one image (`dry_run`); UserError naming where channels do not fit.

    packing: of the inputs, where there are several.
    """
    reached: list[str] = []
    shape: tuple[int, ...] = input_shape
    if packing is not None:
        model, shape = packing.install(deep_copy(model)), (sum(packing.sizes),)

    def run(network: nn.Module, image: Tensor) -> None:
        reached.clear()
        for name, module in network.named_modules():
            if not any(module.children()):
                module.register_forward_pre_hook(lambda *_, name=name: reached.append(name))
        network(image)

    try:
        dry_run(model, shape, run)
    except (RuntimeError, ValueError) as error:
        where = f"at or after {reached[-1]}" if reached else "at the input"
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"what the plan removes does not fit together {where}: {reason}") from None


def _remaining(name: str, what: str, removed: list[int], width: int) -> list[int]:
    """Return the numbers that are left of `width` channels."""
    if removed[-1] >= width:
        raise UserError(f"plan removes {what} {removed[-1]} of {name}, which has {width}")
    if len(removed) == width:
        raise UserError(f"plan removes all {width} {what}s of {name}: one must be left")
    return sorted(set(range(width)) - set(removed))


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    buffers = dict(module.named_buffers(recurse=False))
    return {**dict(module.named_parameters(recurse=False)), **buffers}


def _replace(module: nn.Module, key: str, tensor: Tensor, left: list[int], dim: int) -> None:
    cut = tensor.index_select(dim, torch.tensor(left, device=tensor.device))
    if isinstance(tensor, nn.Parameter):
        setattr(module, key, nn.Parameter(cut, requires_grad=tensor.requires_grad))
    else:
        setattr(module, key, cut)


def _width(module: nn.Module, attribute: str) -> int:
    width = getattr(module, attribute)
    return math.prod(width) if isinstance(width, tuple) else width


def _set_width(module: nn.Module, attribute: str, width: int) -> None:
    setattr(module, attribute, (width,) if isinstance(getattr(module, attribute), tuple) else width)
    if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
        module.num_groups = width
