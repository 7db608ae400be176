"""A network as fast as we can run it in PyTorch: batch norm folded, epilogues fused."""

import logging
import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from sbf_dist.export.fold import fold_batchnorm
from sbf_dist.export.fused import (
    FusedConv2d,
    FusedSBFConv2d,
    FusedWholeBasis,
    numeric_padding,
)
from sbf_dist.export.tracing import UntraceableError, planned_inputs, traced
from sbf_dist.export.unscaled import UnscaledSBFConv2d
from sbf_dist.export.whole_basis import reads_most_of_basis
from sbf_dist.hooks import is_altered
from sbf_dist.layers import SBFConv2d
from sbf_dist.layout import lay_out_in_channels_last
from sbf_dist.ops import Activation
from sbf_dist.padding import PaddedConv2d
from sbf_dist.surgery import become, unwrapped

logger = logging.getLogger(__name__)

SBF = SBFConv2d | UnscaledSBFConv2d

MODULES: dict[type[nn.Module], Activation] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
FUNCTIONS: dict[object, Activation] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
METHODS: dict[str, Activation] = {"relu": "relu", "relu_": "relu"}
# In inference. Folding leaves an identity where a batch norm was.
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
VIEWS = {"view": "reshape", "view_as": "reshape_as"}
LAYOUT_METHODS = {"as_strided", "stride", "is_contiguous", "storage", "untyped_storage", "data_ptr"}
ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
IN_PLACE_OPERATORS = {value for name, value in vars(operator).items() if name.startswith("__i")}


def optimize(model: nn.Module) -> nn.Module:
    """Return a faster copy of `model` for inference, with the same results up to rounding.

    Batch norms are folded (`fold_batchnorm`). A convolution, SBF or dense, is fused with the
    residual addition and the activation (ReLU, ReLU6, SiLU, hard-swish) that follow it. Weights are
    in channels_last, and on the CPU in oneDNN's blocked layout from the first call on. The copy has
    no gradients, and its weights are constants. It can be compiled by torch.compile, with or
    without torch._inductor.config.freezing; SBF layers stay operators of their own.

    Give it images in channels_last. Layers with a padding_mode other than zeros, or uneven "same"
    padding, are not changed. If torch.fx cannot trace the network, or its code depends on the
    memory layout of features, a warning gives the reason; layers are then fused without what
    follows them, and the layout is that of `model`. `model` is not changed.

    The copy is for the inputs that a student's plan knows, and for arguments without a default in
    any other network. Further arguments keep their defaults: another value raises UserError.
    """
    model = unwrapped(model)
    inputs = planned_inputs(model)
    folded = fold_batchnorm(model, inputs)
    for parameter in folded.parameters():
        parameter.requires_grad_(False)
    try:
        graph = traced(folded, inputs)
    except UntraceableError as error:
        logger.warning(
            "activations and residuals are not fused: %s cannot be traced by torch.fx (%s)",
            type(model).__name__,
            error,
        )
        return _fuse_each(folded)
    asks = _what_asks_for_layout(graph, folded)
    if asks is not None:
        logger.warning(
            "activations and residuals are not fused: %s calls %s, whose result depends on how "
            "features lie in memory",
            type(model).__name__,
            asks,
        )
        return _fuse_each(folded)
    lay_out_in_channels_last(folded)
    _reshape_views(graph)
    _drop_identities(graph, folded)
    _fuse_all(graph, folded)
    _reuse_residuals(graph, folded)
    graph.lint()
    return fx.GraphModule(folded, graph, type(model).__name__).eval()


@dataclass(frozen=True)
class _Epilogue:
    """What follows a convolution: the nodes, and what they come to."""

    nodes: list[fx.Node]
    residual: fx.Node | None
    activation: Activation


def _fuse_each(model: nn.Module) -> nn.Module:
    """Fuse each convolution of `model`, in place, with nothing but its bias."""
    bases = [module.basis for module in model.modules() if isinstance(module, SBF)]
    for module in list(model.modules()):
        if _is_fusible(module) and module not in bases:
            become(module, _fused(module, "none"))
    for module in model.modules():
        if isinstance(module, FusedConv2d):
            module.keeps_layout = True
    return model


def _is_view(node: fx.Node) -> bool:
    """Tell whether `node` is a view of another shape (not of another dtype)."""
    if node.op != "call_method" or node.target not in VIEWS or node.kwargs:
        return False
    return not any(isinstance(arg, torch.dtype) for arg in node.args)


def _what_asks_for_layout(graph: fx.Graph, model: nn.Module) -> str | None:
    """Name what `graph` calls whose result depends on strides, or None."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target in LAYOUT_METHODS:
            return f"Tensor.{node.target}"
        if node.op == "call_function" and node.target is torch.as_strided:
            return "torch.as_strided"
        # What is written to a view, its other readers see; of a copy they would not.
        shared = _is_view(node) and len(node.all_input_nodes[0].users) > 1
        if shared and any(_writes(reader, model) for reader in node.users):
            return f"Tensor.{node.target} and writes to its result"
    return None


def _reshape_views(graph: fx.Graph) -> None:
    """Put reshape for view, which fails on features that lie in channels_last."""
    for node in graph.nodes:
        if _is_view(node):
            node.target = VIEWS[str(node.target)]


def _fuse_all(graph: fx.Graph, model: nn.Module) -> None:
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    reads = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        name = str(node.target)
        module = model.get_submodule(name)
        if not _is_fusible(module) or any(read.startswith(f"{name}.") for read in reads):
            continue
        if calls[node.target] > 1 or node.kwargs:
            continue
        epilogue = _epilogue(node, model)
        become(module, _fused(module, epilogue.activation))
        if not epilogue.nodes:
            continue
        # The residual may be computed after the convolution: the call moves to where it is added.
        after = epilogue.nodes[0] if epilogue.residual else node
        with graph.inserting_after(after):
            inputs = (*node.args, *([epilogue.residual] if epilogue.residual else []))
            call = graph.call_module(name, inputs)
        epilogue.nodes[-1].replace_all_uses_with(call)
        for old in (*reversed(epilogue.nodes), node):
            graph.erase_node(old)


def _reuse_residuals(graph: fx.Graph, model: nn.Module) -> None:
    """Let convolutions write over a residual that they are the last to read."""
    position = {node: index for index, node in enumerate(graph.nodes)}

    def fused(node: fx.Node) -> nn.Module | None:
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        kinds = FusedConv2d | FusedWholeBasis | FusedSBFConv2d
        return module if isinstance(module, kinds) else None

    for node in graph.nodes:
        layer = fused(node)
        if isinstance(layer, FusedWholeBasis):
            layer = layer.product
        if not isinstance(layer, FusedConv2d) or len(node.args) != 2:
            continue
        image, residual = node.args
        assert isinstance(residual, fx.Node)
        # Fused layers alone are known to give, and to leave, no other name to the same memory.
        layer.overwrites_residual = (
            image is not residual
            and fused(residual) is not None
            and all(
                fused(reader) is not None and position[reader] <= position[node]
                for reader in residual.users
            )
        )


def _is_fusible(module: nn.Module) -> bool:
    if any(map(is_altered, module.modules())):
        return False
    if isinstance(module, nn.Conv2d) and type(module) in (nn.Conv2d, PaddedConv2d):
        return numeric_padding(module) is not None
    if getattr(module, "between", None) is not None:
        return False  # two operators with others in the middle
    if isinstance(module, SBF):
        basis = module.get_submodule("basis")
        assert isinstance(basis, nn.Conv2d)
        return numeric_padding(basis) is not None
    return False


def _fused(module: nn.Module, activation: Activation) -> nn.Module:
    if isinstance(module, nn.Conv2d):
        return FusedConv2d(module, activation).eval()
    assert isinstance(module, SBF)
    if reads_most_of_basis(module):
        return FusedWholeBasis(module, activation).eval()
    return FusedSBFConv2d(module, activation).eval()


def _epilogue(conv: fx.Node, model: nn.Module) -> _Epilogue:
    """Find the addition and the activation that alone read, one after the other, `conv`."""
    nodes: list[fx.Node] = []
    residual, last = None, conv
    while len(last.users) == 1:
        (reader,) = last.users
        activation = _activation(reader, model)
        if activation is not None:
            return _Epilogue([*nodes, reader], residual, activation)
        addend = None if residual is not None else _addend(reader, last)
        if addend is None or _is_written_between(conv, reader, model):
            break
        nodes, residual, last = [*nodes, reader], addend, reader
    return _Epilogue(nodes, residual, "none")


def _activation(node: fx.Node, model: nn.Module) -> Activation | None:
    if len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return None if is_altered(module) else MODULES.get(type(module))
    if node.op == "call_function":
        return FUNCTIONS.get(node.target)
    if node.op == "call_method":
        return METHODS.get(str(node.target))
    return None


def _addend(node: fx.Node, last: fx.Node) -> fx.Node | None:
    """Return what `node` adds to `last`; None if it is not a plain addition of another tensor."""
    if node.op not in ("call_function", "call_method") or node.target not in ADDITIONS:
        return None
    if len(node.args) != 2 or node.kwargs:  # alpha, out
        return None
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
        return None
    if first is last:
        return second
    # `residual += output` writes to the residual, which others may read.
    return None if _writes(node, None) else first


def _is_written_between(conv: fx.Node, end: fx.Node, model: nn.Module) -> bool:
    """Whether something between the two nodes may change what `conv` reads."""
    node = conv.next
    while node is not end:
        if _writes(node, model):
            return True
        node = node.next
    return False


def _writes(node: fx.Node, model: nn.Module | None) -> bool:
    """Whether `node` changes one of its arguments."""
    if node.op == "call_module":
        assert model is not None
        module = model.get_submodule(str(node.target))
        return bool(getattr(module, "inplace", False)) or any(map(is_altered, module.modules()))
    if node.op == "call_method":
        name = str(node.target)
        return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if node.op != "call_function":
        return False
    in_place = node.kwargs.get("inplace", False) or any(arg is True for arg in node.args)
    name = getattr(node.target, "__name__", "")
    return (
        bool(in_place)
        or node.target in IN_PLACE_OPERATORS
        or node.target is operator.setitem
        or (name.endswith("_") and not name.endswith("__"))
        or "out" in node.kwargs
    )


def _drop_identities(graph: fx.Graph, model: nn.Module) -> None:
    """Remove what does nothing in inference from between the others."""
    for node in list(graph.nodes):
        if _is_identity(node, model):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)


def _is_identity(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return type(module) in IDENTITIES and not is_altered(module)
    if node.op != "call_function":
        return False
    # torchvision's function is known by its name: the library need not be there
    if getattr(node.target, "__name__", "") == "stochastic_depth":
        return node.kwargs.get("training", (*node.args, None, None, None)[3]) is False
    return node.target is F.dropout and node.kwargs.get("training") is False
