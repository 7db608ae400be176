"""Folding of batch norm into the convolution before it, for inference."""

import logging
from collections import Counter

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sbf_dist.compression.recognition import make_all_plain
from sbf_dist.export.tracing import UntraceableError, planned_inputs, traced
from sbf_dist.export.unscaled import UnscaledSBFConv2d
from sbf_dist.hooks import is_altered
from sbf_dist.layers import SBFConv2d
from sbf_dist.padding import PaddedConv2d
from sbf_dist.surgery import become, deep_copy, unwrapped

logger = logging.getLogger(__name__)

# A basis filter is rescaled by its own channel's factor a_c, and the transformations that read it
# are divided by a_c. Where that would magnify one by more than this, the basis filter keeps its
# scale: float16 has a range of about 2^±15 and weights need a part of it.
MAX_GAIN = 1024.0

Norm = nn.BatchNorm2d | nn.SyncBatchNorm


def fold_batchnorm(model: nn.Module, inputs: tuple[Tensor, ...] | None = None) -> nn.Module:
    """Return an inference copy of `model` with batch norms folded into the convolutions before.

    Convolutions that pad in their own way, or compute their filters, become plain ones first. A
    batch norm (plain, synchronised, or timm's with its activation) is folded where it is the
    only reader of an nn.Conv2d's or SBFConv2d's output; the results agree with `model.eval()` up
    to rounding, borders included. Batch norms that stay are logged as a warning with the reason;
    so is a network that torch.fx cannot trace, which is copied unfolded. `model` is not changed.

    inputs: an example of what the network is called with, of which only shapes and integers count;
        by default what a student's plan says. See `sbf_dist.export.tracing.traced`.
    """
    folded = deep_copy(unwrapped(model))
    inputs = planned_inputs(folded) if inputs is None else inputs
    folded.eval()  # a statement: a network's own train() may return nothing
    make_all_plain(folded)
    for parameter in folded.parameters():
        parameter.requires_grad_(False)
    inside = {
        part
        for layer in folded.modules()
        if isinstance(layer, SBFConv2d) and layer.between is not None
        for part in layer.between.modules()
    }
    norms = {
        name: module
        for name, module in folded.named_modules()
        if isinstance(module, Norm) and module not in inside
    }
    if not norms:
        return folded
    try:
        graph = traced(folded, inputs)
    except UntraceableError as error:
        logger.warning(
            "batch norm is not folded: %s cannot be traced by torch.fx (%s)",
            type(model).__name__,
            error,
        )
        return folded
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    reads = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    left = dict.fromkeys(norms, "it is never called")
    for node in graph.nodes:
        if node.op != "call_module" or node.target not in norms:
            continue
        name, norm = node.target, norms[node.target]
        reason = _obstacle(folded, node, norm, calls, reads)
        if reason:
            left[name] = reason
            continue
        _fold_pair(folded, str(node.all_input_nodes[0].target), norm)
        become(norm, _what_remains(norm))
        del left[name]
    for reason in dict.fromkeys(left.values()):
        names = [name for name, its_reason in left.items() if its_reason == reason]
        logger.warning("not folded, %s: batch norm %s", reason, ", ".join(names))
    return folded


def _obstacle(
    model: nn.Module, node: fx.Node, norm: Norm, calls: Counter, reads: set[str]
) -> str | None:
    """Say why the batch norm at `node` cannot be folded, or None if it can."""
    if any(map(is_altered, norm.modules())):
        return "it has hooks, or a forward of its own"
    if not _is_known(norm):
        return f"{type(norm).__name__} may do more than normalise"
    if norm.running_mean is None:
        return "it has no running statistics"
    if calls[node.target] > 1:
        return f"it is called {calls[node.target]} times"
    (before,) = node.all_input_nodes
    if before.op != "call_module":
        return "it does not follow a convolution"
    return _obstacle_before(model, before, calls, reads)


def _obstacle_before(
    model: nn.Module, node: fx.Node, calls: Counter, reads: set[str]
) -> str | None:
    name = str(node.target)
    module = model.get_submodule(name)
    if type(module) not in (nn.Conv2d, PaddedConv2d, SBFConv2d):
        return f"it follows a {type(module).__name__}"
    if any(map(is_altered, module.modules())):
        return f"its convolution {name} has hooks, which may compute its weights"
    if getattr(module, "between", None) is not None:
        return "it follows an SBF layer whose basis features another batch norm reads"
    return _obstacle_in_graph(node, calls, reads)


def _obstacle_in_graph(node: fx.Node, calls: Counter, reads: set[str]) -> str | None:
    name = str(node.target)
    if calls[name] > 1:
        return f"its convolution {name} is called {calls[name]} times"
    if len(node.users) > 1:
        return f"the output of its convolution {name} has {len(node.users)} readers"
    if any(read.startswith(name + ".") for read in reads):
        return f"the weights of its convolution {name} are read elsewhere"
    return None


def _is_known(norm: Norm) -> bool:
    return type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) or _is_timm_norm(norm)


def _is_timm_norm(norm: Norm) -> bool:
    # by name first: timm takes seconds to import, and only its own networks hold these
    if type(norm).__name__ != "BatchNormAct2d":
        return False
    from timm.layers import BatchNormAct2d

    return type(norm) is BatchNormAct2d


def _what_remains(norm: Norm) -> nn.Module:
    if not _is_timm_norm(norm):
        return nn.Identity()
    parts = [norm.get_submodule("drop"), norm.get_submodule("act")]
    parts = [part for part in parts if not isinstance(part, nn.Identity)]
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)


def _fold_pair(model: nn.Module, name: str, norm: Norm) -> None:
    conv = model.get_submodule(name)
    if isinstance(conv, SBFConv2d):
        become(conv, fold_into_sbf(conv, norm))
    else:
        assert isinstance(conv, nn.Conv2d)
        become(conv, fuse_conv_bn_eval(conv, norm))


def fold_into_sbf(layer: SBFConv2d, norm: Norm) -> SBFConv2d | UnscaledSBFConv2d:
    """Fold `norm` (in eval mode, with running statistics) into a copy of `layer`.

    With a_c = gamma_c / sqrt(var_c + eps): a basis filter W_b is multiplied by the a of its own
    channel, a transformation t_{c,s} by a_c / a_source, and the shift is in the bias, which is
    added after expand. Where a_source is zero or tiny beside a_c that quotient is no use; that
    basis filter stays unscaled, and the layer becomes an UnscaledSBFConv2d.
    """
    dtype = layer.transforms.dtype
    channels = layer.order.numel()
    scale, shift = _affine(norm)
    bias = shift if layer.bias is None else scale * layer.bias.double() + shift

    kept = layer.basis.out_channels
    by_entry = torch.empty_like(scale)  # scales in the order of cat([basis, rebuilt])
    by_entry[layer.order] = scale
    basis_scale, rebuilt_scale = by_entry[:kept], by_entry[kept:]
    transforms = layer.transforms.detach().double() * rebuilt_scale.view(-1, 1, 1, 1)

    hidden = _needed_unscaled(transforms, layer.sources, rebuilt_scale, basis_scale)
    factor = basis_scale.masked_fill(hidden, 1.0)
    divisor = torch.where(factor == 0, 1.0, factor)  # a zero factor is read by zero taps only
    transforms = transforms / divisor[layer.sources][:, :, None, None]

    folded = deep_copy(layer)
    weight = layer.basis.weight.detach().double() * factor.view(-1, 1, 1, 1)
    folded.basis.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if not hidden.any():
        folded.transforms = nn.Parameter(transforms.to(dtype), requires_grad=False)
        folded.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        return folded

    # The hidden basis features' own channels become rebuilt ones: slot 0 is a centre tap a_c.
    positions = hidden.nonzero().flatten()
    count, (_, slots, m, _) = len(positions), transforms.shape
    taps = transforms.new_zeros(count, slots, m, m)
    taps[:, 0, m // 2, m // 2] = basis_scale[positions]
    entry = torch.arange(channels, device=positions.device)
    entry[positions] = channels + torch.arange(count, device=positions.device)
    unscaled = UnscaledSBFConv2d(
        folded.basis,
        transforms=torch.cat([transforms, taps]).to(dtype),
        sources=torch.cat([layer.sources, positions[:, None].expand(-1, slots)]),
        order=torch.cat([entry[layer.order], positions]),
        bias=torch.cat([bias, bias.new_zeros(count)]).to(dtype),
        out_channels=channels,
    )
    return unscaled.requires_grad_(False).eval()


def _affine(norm: Norm) -> tuple[Tensor, Tensor]:
    """Return a batch norm's scale and shift, each (C,), in double precision."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -scale * mean.double()
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def _needed_unscaled(
    transforms: Tensor, sources: Tensor, rebuilt_scale: Tensor, basis_scale: Tensor
) -> Tensor:
    """Mark, (B,) of bool, the basis features that a rebuilt channel of much larger scale reads."""
    used = transforms.abs().amax((2, 3)) > 0
    demand = rebuilt_scale.abs()[:, None].expand_as(sources) * used
    most = torch.zeros_like(basis_scale)
    most.scatter_reduce_(0, sources.flatten(), demand.flatten(), "amax")
    return most > MAX_GAIN * basis_scale.abs()
