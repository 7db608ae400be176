"""A network's graph, as torch.fx traces it, where that is what the network computes."""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from sbf_dist.compression.inputs import Described, Packing, number_of_inputs
from sbf_dist.compression.named_outputs import named_tensors
from sbf_dist.compression.remembered import plan_of
from sbf_dist.errors import UserError
from sbf_dist.export.unscaled import UnscaledSBFConv2d
from sbf_dist.hooks import is_altered
from sbf_dist.layers import SBFConv2d
from sbf_dist.padding import PaddedConv2d
from sbf_dist.surgery import deep_copy

logger = logging.getLogger(__name__)

LEAVES = SBFConv2d | UnscaledSBFConv2d | PaddedConv2d | nn.BatchNorm2d | nn.SyncBatchNorm


class UntraceableError(Exception):
    """No graph says what a network computes; the text says why."""


def traced(model: nn.Module, inputs: tuple[Tensor, ...] | None = None) -> fx.Graph:
    """Return the graph of `model`, which is in eval mode, with SBF layers and batch norms as nodes.

    Arguments of its forward that have a default, and are not among `inputs`, are constants in it.
    inputs: an example of what the network is called with, of which only shapes and integers count.
        The graph is run on it, and must give what the network gives: torch.fx traces with stand-ins
        for tensors, for which code that asks `isinstance` takes another branch.

    Raises UntraceableError.
    """
    if is_altered(model):  # torch.fx calls the forward of its class
        raise UntraceableError("the network itself has hooks, or a forward of its own")
    # of a copy, and first: tracing may leave stand-ins in the attributes of the network
    wanted = None if inputs is None else _outputs(deep_copy(model), inputs)
    given = number_of_inputs(model) if inputs is None else len(inputs)
    try:
        graph = LayerTracer(given).trace(model)
    except Exception as error:  # torch.fx raises whatever the traced code raises
        raise UntraceableError(f"{type(error).__name__}: {error}") from error
    if inputs is None or wanted is None:
        return graph
    found = _outputs(model, inputs, graph)
    if (
        found is None
        or found.keys() != wanted.keys()
        or not all(_is_near(found[name], wanted[name]) for name in wanted)
    ):
        raise UntraceableError("its code takes another branch when it is traced")
    return graph


class LayerTracer(fx.Tracer):
    """torch.fx's tracer, to which an SBF layer and a batch norm are one node each.

    given: the first arguments of forward, so many, are inputs, even if they have a default; the
        others with a default are constants. None: all are inputs.
    """

    def __init__(self, given: int | None = None) -> None:
        super().__init__()
        self.given = given

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Whether `module` is not traced into."""
        return isinstance(module, LEAVES) or super().is_leaf_module(module, name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Return what is traced and its arguments, after the module itself.

        torch.fx's own `concrete_args` would give arguments other names.
        """
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        if self.given is None:
            return function, args
        parameters = inspect.signature(inspect.unwrap(root_fn)).parameters
        for place, arg in enumerate(args):
            if not isinstance(arg, fx.Proxy) or place <= self.given:
                continue
            parameter = parameters.get(str(arg.node.target))
            if parameter is None or parameter.default is parameter.empty:
                continue
            check_default(arg, parameter.default, parameter.name)
            args[place] = parameter.default
        return function, args


def check_default(value: Any, default: Any, name: str) -> None:
    """Raise UserError if an argument of a traced network is not the default that it was traced for.

    While a network is traced, the check becomes part of its graph.
    """
    if isinstance(value, fx.Proxy):
        value.tracer.create_proxy("call_function", check_default, (value, default, name), {})
        return
    if value is default or (not isinstance(value, Tensor) and bool(value == default)):
        return
    raise UserError(
        f"argument {name} is fixed to its default, {default!r}, in a network that was optimized"
    )


def planned_inputs(model: nn.Module) -> tuple[Tensor, ...] | None:
    """Return an example of what a student is called with, by its plan; None of other networks."""
    try:
        return example_inputs(1, plan_of(model))
    except UserError:
        return None


def example_inputs(
    batch: int, described: Described | None, input_shape: tuple[int, int, int] | None = None
) -> tuple[Tensor, ...]:
    """Return inputs of zeros, as a plan or a card describes them, or of a shape."""
    if described is None:
        assert input_shape is not None
        return (torch.zeros(batch, *input_shape),)
    others = Packing.planned(described)
    if others is None:
        return (torch.zeros(batch, *described.input_shape),)
    pairs = zip(others.shapes, others.dtypes, strict=True)
    return tuple(torch.zeros(batch, *shape, dtype=dtype) for shape, dtype in pairs)


@torch.no_grad()
def _outputs(
    model: nn.Module, inputs: tuple[Tensor, ...], graph: fx.Graph | None = None
) -> dict[str, Tensor] | None:
    """Return what `model`, or its graph, gives; None if it cannot be run.

    On noise of the shapes of `inputs`; integers, which may be indices, are as given.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    noise = torch.Generator().manual_seed(0)
    images = [
        torch.randn(one.shape, generator=noise).to(like)
        if one.is_floating_point()
        else one.to(like.device)
        for one in inputs
    ]
    run = model if graph is None else fx.Interpreter(model, graph=graph).run
    try:
        # Both runs draw the same random numbers; a trace drew others, which are constants in it.
        with torch.random.fork_rng([like.device] if like.is_cuda else []):
            torch.rand(1, device=like.device)
            return named_tensors(run(*images))
    except Exception as error:  # whatever the network's own code raises on noise
        logger.debug("%s cannot be run on noise: %s", type(model).__name__, error)
        return None


def _is_near(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if not wanted.is_floating_point() or not wanted.numel():
        return torch.equal(found, wanted)
    largest = float(wanted.nan_to_num(0, 0, 0).abs().max())
    most = largest * torch.finfo(wanted.dtype).eps ** 0.5  # kernels on CUDA may differ in two runs
    return torch.allclose(found, wanted, rtol=0, atol=most, equal_nan=True)
