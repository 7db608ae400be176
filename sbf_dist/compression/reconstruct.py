"""From a network to a fitted SBF network: plan within the budget, then fit layer by layer.

The layers are fitted in forward order, each on the inputs that the layers converted before it
produce, towards the dense network's outputs, so that later layers mend what earlier ones spoil.
"""

from collections.abc import Mapping
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor, nn

from sbf_dist.budget import ROUNDING, Budget
from sbf_dist.compression.calibration import Calibration, Images
from sbf_dist.compression.candidates import find_candidates, forward_order
from sbf_dist.compression.convertible import check_dense, nothing_to_convert
from sbf_dist.compression.cost import Cost, count
from sbf_dist.compression.dense_plan import dense_plan
from sbf_dist.compression.finite import check_weights
from sbf_dist.compression.fitting.between import insert_between
from sbf_dist.compression.fitting.layerwise import layer_of
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.refit import is_mended, linear_heads
from sbf_dist.compression.fitting.resuming import Passes, Route
from sbf_dist.compression.fitting.sequential import SequentialFit
from sbf_dist.compression.fitting.settle import settle
from sbf_dist.compression.fitting.shelf import Shelf
from sbf_dist.compression.holding_out import not_judged, split
from sbf_dist.compression.outputs import Yardstick
from sbf_dist.compression.plan import DenseLayer, Latency, Layer, Plan, SBFLayer
from sbf_dist.compression.planning.allocation import Allocation, share_out
from sbf_dist.compression.planning.explanation import Spending
from sbf_dist.compression.planning.knapsack import Option
from sbf_dist.compression.planning.latency import latencies
from sbf_dist.compression.planning.latency_budget import TimedChoice
from sbf_dist.compression.planning.latency_table import Timing, environment
from sbf_dist.compression.planning.option_table import OptionTable, measure_options
from sbf_dist.compression.planning.options import Search, Shape
from sbf_dist.compression.precision import (
    check_timed,
    with_types_of,
    without_autocast,
    working_copy,
    working_reference,
)
from sbf_dist.compression.prepared_images import calibration_for
from sbf_dist.compression.progress import Progress, report
from sbf_dist.compression.recognition import Recognised, recognise
from sbf_dist.errors import UserError
from sbf_dist.layers import SBFConv2d
from sbf_dist.models import Architecture
from sbf_dist.settings import Compression
from sbf_dist.surgery import become, deep_copy, unwrapped, with_convolutions


@torch.no_grad()
@without_autocast()
def rebuild(
    model: nn.Module,
    images: Images,
    settings: Compression,
    *,
    name: str | Architecture | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    timing: Timing | None = None,
    reference: Reference | None = None,
) -> tuple[nn.Module, Plan]:
    """Convert `model` to a fitted SBF network within the budget, without removing channels.

    Layers are fitted to the outputs of `reference`, the network that `model` was narrowed from
    (`model` itself, if that is None). The other arguments, and what is returned and raised, are
    those of `one_shot.compress`.
    """
    model = unwrapped(model)
    kind = (name.name if isinstance(name, Architecture) else name) or type(model).__name__
    check_weights(model, kind)
    check_dense(model, kind)
    check_timed(model, settings.budget)
    dense = working_copy(model)
    calibration = calibration_for(dense, images)
    plan = dense_plan(dense, calibration, name, settings)
    student, new = rebuild_more(
        dense,
        plan,
        calibration,
        settings,
        seed=seed,
        progress=progress,
        timing=timing,
        reference=None if reference is None else working_reference(reference),
    )
    return with_types_of(model, student), new


@torch.no_grad()
def rebuild_more(
    network: nn.Module,
    plan: Plan,
    images: Calibration,
    settings: Compression,
    *,
    seed: int,
    progress: Progress | None,
    timing: Timing | None,
    reference: Reference | None,
) -> tuple[nn.Module, Plan]:
    """Bring `network`, in eval mode and as `plan` has it, within the budget.

    The basis of its SBF layers may become smaller, and its dense layers SBF layers: only 1 is tried
    for m in layers of more than LARGEST_GRAM / m² channels, whose Gram matrices would be too large.
    Returns a new network in eval mode, and its plan, which makes it of the dense network.
    """
    dense = with_convolutions(network)
    examples = images.first(2)
    yardstick = Yardstick.of(network, images, settings)
    images, held = split(images)
    # The least that rebuilding a channel takes is one tap.
    reasons, candidates = find_candidates(dense, examples, 1, settings.keep, settings.outputs)
    cost = count(network, images.shape, examples)
    if not candidates and not _fits(settings.budget, cost, plan):
        raise nothing_to_convert(dense, plan.model, reasons)
    search, timing = Search(settings, yardstick), timing or Timing()
    shapes = {name: _shape(network, plan, name, cost.layers[name]) for name in candidates}
    sbf = {n: layer for n in candidates if isinstance(layer := layer_of(network, n), SBFConv2d)}
    reference = reference or Reference(network)
    layers = candidates + linear_heads(network, examples)
    route = Route.of(network, reference.module, images.first(3), layers, settings.feature_bytes)
    found = measure_options(
        Passes(network, images, route.student, Shelf(route.memory)),
        shapes,
        {name: _as_it_is(network, name, shape) for name, shape in shapes.items()},
        held,
        search,
        seed=seed,
        among={name: layer.kept for name, layer in sbf.items()},
        progress=progress,
    )
    shared = share_out(
        network,
        found,
        cost,
        Cost(plan.macs_before, plan.params_before, {}),
        search,
        examples[:1],
        timing,
        partial(report, progress, "measure latency"),
    )
    rows = shared.options
    notes = {name: note for name in shapes if (note := _note(network, name)) is not None}
    changed = {name: o for name, o in shared.chosen.items() if o != rows[name][0]}
    student = deep_copy(network)
    for name in changed.keys() & sbf.keys():
        become(student.get_submodule(name), deep_copy(dense.get_submodule(name)))
    in_order = forward_order(dense, examples)
    order = [name for name in in_order if isinstance(layer_of(student, name), nn.Conv2d)]
    # What comes before the first change gives what it gave: solving it anew could gain nothing.
    same = list(takewhile(lambda n: n not in changed, order)) if reference.module is network else []
    sizes = _sizes(student, order[len(same) :], changed, found, settings, examples)
    fit = SequentialFit(
        student,
        reference,
        sizes,
        images,
        refit=settings.refit,
        held=held,
        priors=found.priors,
        route=route,
    )
    fitted = fit_layers(fit, order, changed, found, progress)
    if settings.between is not None:
        fitted = insert_between(student, fitted, images, settings.between)
        fit.forget()
    judge, steps = None, []
    if changed or reference.module is not network:
        judge = settle(
            student,
            reference,
            images,
            held,
            refit=settings.refit,
            yardstick=yardstick,
            priors=found.priors,
            fit=fit,
        )
        steps = [not_judged(images)] if judge is None else judge.steps
    after = count(student, images.shape, examples)
    latency = None
    if shared.timed is not None:
        latency = _latency(network, student, images, timing)
    spending = _spending(search, found, shared, plan, (cost, after), latency)
    if settings.budget.unit != "ms":
        settings.budget.check(spending.after, spending.dense)
    update = {
        "format": 2,
        "budget": settings.budget.given(),
        "macs_after": after.macs,
        "params_after": after.params,
        "latency": latency,
        "criterion": settings.criterion,
        "explanation": spending.explain(reasons) + steps,
        "fidelity": judge.record() if judge else None,
        "layers": _noted(_layers(plan, fitted, reasons, spending, shared.timed), fitted, notes),
    }
    return student, plan.model_copy(update=update)


def fit_layers(
    fit: SequentialFit,
    order: list[str],
    chosen: Mapping[str, Option],
    found: OptionTable,
    progress: Progress | None,
) -> dict[str, SBFLayer]:
    """Convert the convolutions that are `chosen`, each as its option says, and mend others.

    `order` are all convolutions in forward order.
    """
    fitted: dict[str, SBFLayer] = {}
    for index, name in enumerate(order, 1):
        report(progress, "fit layers", index, len(order))
        if name in chosen:
            option, macs = chosen[name], found.shapes[name].macs
            if option.whole_basis:
                weights, among = found.sensitivity[name], found.rankings[name].among
                fitted[name] = fit.convert_whole_basis(name, option.kept, weights, among, macs)
            else:
                rank = partial(found.order, name)
                fitted[name] = fit.convert(name, rank, option.kept, option.sources, macs)
        elif fit.fits(name):
            fit.mend(name)
    return fitted


def _fits(budget: Budget, cost: Cost, plan: Plan) -> bool:
    """Whether a network fits its budget as it is; times are not known before they are measured."""
    if budget.unit == "ms":
        return False
    own, dense = cost.macs, plan.macs_before
    if budget.kind == "params":
        own, dense = cost.params, plan.params_before
    return own <= budget.limit(dense) * (1 + ROUNDING)


def _sizes(
    student: nn.Module,
    order: list[str],
    chosen: Mapping[str, Option],
    found: OptionTable,
    settings: Compression,
    examples: Tensor,
) -> dict[str, int]:
    """Return the m of those layers of `order` to fit: `chosen`, with refit others with options."""
    if not chosen:
        return {}

    def is_fitted(name: str) -> bool:
        others = settings.refit and name in found.rows and is_mended(student, name, examples)
        return name in chosen or others

    return {name: chosen[name].size if name in chosen else 1 for name in order if is_fitted(name)}


def _shape(network: nn.Module, plan: Plan, name: str, macs: int) -> Shape:
    """Describe the dense convolution that a layer of `network`, of `macs` multiply-adds, was."""
    layer, planned = layer_of(network, name), plan.layers.get(name)
    if isinstance(layer, nn.Conv2d):
        return Shape.of(layer, macs)
    if not isinstance(planned, SBFLayer):
        raise UserError(f"plan does not make {name} an SBF layer: it belongs to another network")
    weights = layer.basis.weight[0].numel()
    params = layer.out_channels * weights + (0 if layer.bias is None else layer.out_channels)
    return Shape(layer.out_channels, weights, planned.macs_before, params, layer.groups)


def _as_it_is(network: nn.Module, name: str, shape: Shape) -> Option:
    layer = layer_of(network, name)
    if isinstance(layer, nn.Conv2d):
        return shape.as_it_is()
    kept, used, size = len(layer.kept), layer.sources.shape[1], layer.transform_size
    cost = shape.option_macs(kept, used, size)
    return Option(kept, used, size, cost, loss=0.0, whole_basis=size == 1 and used == kept)


def _latency(
    network: nn.Module, student: nn.Module, images: Calibration, timing: Timing
) -> Latency:
    """Measure both networks side by side."""
    ready = [timing.prepare(network), timing.prepare(student)]
    before, after = latencies(ready, images.shape, batch=timing.table.batch)
    return Latency(
        machine=environment(next(network.parameters())),
        batch=timing.table.batch,
        ms_before=round(before, 4),
        ms_after=round(after, 4),
    )


def _spending(
    search: Search,
    found: OptionTable,
    shared: Allocation,
    plan: Plan,
    costs: tuple[Cost, Cost],
    latency: Latency | None,
) -> Spending:
    """Put together how the budget was spent; `costs` are the network's before and after."""
    now, after = costs
    spent: tuple[float, float, float] = (plan.macs_before, now.macs, after.macs)
    if latency is not None:
        spent = (latency.ms_before, latency.ms_before, latency.ms_after)
    elif search.settings.budget.kind == "params":
        spent = (plan.params_before, now.params, after.params)
    return Spending(
        search=search,
        options=shared.options,
        chosen=shared.chosen,
        channels={name: shape.channels for name, shape in found.shapes.items()},
        criteria={name: ranking.criterion for name, ranking in found.rankings.items()},
        dense=spent[0],
        before=spent[1],
        after=spent[2],
    )


def _layers(
    plan: Plan,
    fitted: Mapping[str, SBFLayer],
    reasons: Mapping[str, str],
    spending: Spending,
    timed: TimedChoice | None,
) -> dict[str, Layer]:
    """Return the plans of all layers, with their reasons, and their times where these decided."""
    layers = dict(plan.layers)
    for name, layer in plan.layers.items():
        if name in spending.chosen:
            planned = fitted.get(name, layer)
            update: dict[str, object] = {"reason": spending.reason(name)}
            if isinstance(planned, DenseLayer):
                update["convertible"] = True
            if timed is not None:
                before = round(timed.dense_ms[name], 4)
                after = round(spending.chosen[name].cost, 4)
                times = {"ms_before": before, "ms_after": after}
                update |= times if isinstance(planned, SBFLayer) else {"ms": before}
            layers[name] = planned.model_copy(update=update)
        elif name in reasons and isinstance(layer, DenseLayer):
            update = {"reason": reasons[name], "convertible": False}
            layers[name] = layer.model_copy(update=update)
    return layers


def _note(network: nn.Module, name: str) -> str | None:
    """Say what converting a convolution of a class of its own changes beside its channels."""
    layer = layer_of(network, name)
    if isinstance(layer, SBFConv2d):
        return None
    known = recognise(layer)
    return known.note if isinstance(known, Recognised) else None


def _noted(
    layers: dict[str, Layer], fitted: Mapping[str, SBFLayer], notes: Mapping[str, str]
) -> dict[str, Layer]:
    """Add `notes` to the reasons of the layers that were converted."""
    for name in fitted.keys() & notes.keys():
        reason = f"{layers[name].reason}; {notes[name]}"
        layers[name] = layers[name].model_copy(update={"reason": reason})
    return layers
