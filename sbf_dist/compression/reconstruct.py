"""From a dense network to a fitted SBF network: plan by budget, then fit layer by layer.

The layers are fitted in forward order, each on the inputs that the layers converted before it
produce, towards the dense network's outputs, so that later layers mend what earlier ones spoil.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from sbf_dist.budget import Budget
from sbf_dist.compression.calibration import Calibration, calibration_for, dtype_of
from sbf_dist.compression.candidates import convolution, find_candidates, forward_order
from sbf_dist.compression.cost import Cost, count
from sbf_dist.compression.fitting.between import insert_between
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.refit import is_mended, refit_heads
from sbf_dist.compression.fitting.sequential import SequentialFit
from sbf_dist.compression.fitting.statistics import measure_batch_norm
from sbf_dist.compression.plan import DenseLayer, Latency, Layer, Plan, SBFLayer
from sbf_dist.compression.planning.allocation import share_out
from sbf_dist.compression.planning.criteria import Criterion
from sbf_dist.compression.planning.explanation import Spending
from sbf_dist.compression.planning.knapsack import Option
from sbf_dist.compression.planning.latency import latencies
from sbf_dist.compression.planning.latency_budget import TimedChoice
from sbf_dist.compression.planning.latency_table import LatencyTable, environment
from sbf_dist.compression.planning.option_table import OptionTable, measure_options
from sbf_dist.compression.planning.options import Search, Shape
from sbf_dist.compression.precision import check_timed, working_copy, working_reference
from sbf_dist.compression.progress import Progress, tell
from sbf_dist.errors import UserError
from sbf_dist.layers import SBFConv2d
from sbf_dist.surgery import deep_copy

NEVER_REACHED = "no forward pass in evaluation mode reaches it"
LISTED = 5  # reasons in a refusal


@torch.no_grad()
def compress(
    model: nn.Module,
    images: Tensor | Calibration,
    *,
    model_name: str,
    classes: int,
    budget: Budget,
    sources: int = 4,
    transform_size: int = 3,
    floor: float = 0.125,
    round_to: int = 1,
    keep: Sequence[str] = (),
    criterion: Criterion = "reconstruction",
    seed: int = 0,
    progress: Progress | None = None,
    table: LatencyTable | None = None,
    for_inference: Callable[[nn.Module], nn.Module] | None = None,
    reference: Reference | None = None,
    refit: bool = True,
    between: Literal["bn_relu"] | None = None,
    mixtures: bool = True,
) -> tuple[nn.Module, Plan]:
    """Convert `model` to a fitted SBF network within `budget`.

    `images` (N, C, H, W), or a Calibration of them, are normalised; labels are not needed. Layers
    are fitted to the outputs of `reference`, the network that `model` was narrowed from (`model`
    itself, if that is None). `sources` is the largest S, `transform_size` the largest m, beside
    which 1 is tried (only 1 in layers of more than LARGEST_GRAM / m² channels, whose Gram matrices
    would be too large); with `mixtures`, rebuilt channels may also read the whole basis with m = 1,
    beyond `sources` (see `mixture`; only with `refit`, and with the criterion 'reconstruction', as
    any basis will do); `floor` is the least share of a layer's channels that is kept, in multiples
    of `round_to`; `keep` are patterns of layers' names to leave alone; `criterion` decides which
    channels are kept (see `criteria`); `refit` solves filters and linear layers anew on what the
    converted layers before them give; `between` is put between basis and transformations, to be
    trained; `progress` is told (what, done, of). With a budget of time, layers and networks are
    measured on the model's device at the images' size: `table` keeps the layers' latencies and says
    how many images are in a forward pass, and a network is measured as `for_inference` makes it (as
    it is, if that is None). Returns the network in eval mode and its plan. Raises UserError if the
    budget cannot be met, a weight is not finite, nothing can be converted, or the network has SBF
    layers already.
    """
    _check_finite(model, model_name)
    _check_dense(model, model_name)
    check_timed(model, budget)
    dense = working_copy(model)
    calibration = calibration_for(dense, images)
    reference = Reference(dense) if reference is None else working_reference(reference)
    input_shape, few = calibration.shape, calibration.first(2)
    # The least that rebuilding a channel takes is one tap.
    reasons, candidates = find_candidates(dense, few, 1, keep)
    cost = count(dense, input_shape, few)
    if not candidates:
        raise _nothing_to_convert(dense, model_name, reasons)

    search = Search(
        sources=sources,
        transform_size=transform_size,
        floor=floor,
        round_to=round_to,
        between=between is not None,
        mixtures=mixtures and refit,
        timed=budget.unit == "ms",
    )
    shapes = {n: Shape.of(convolution(dense, n), cost.layers[n]) for n in candidates}
    found = measure_options(
        dense,
        shapes,
        {name: shape.as_it_is() for name, shape in shapes.items()},
        calibration,
        search=search,
        criterion=criterion,
        seed=seed,
        progress=progress,
    )
    table = table or LatencyTable()
    for_inference = for_inference or _as_it_is
    shared = share_out(
        dense,
        found.rows,
        shapes,
        cost,
        budget,
        few[:1],
        table,
        for_inference,
        lambda done, of: tell(progress, "measure latency", done, of),
        between=between is not None,
    )
    student = deep_copy(dense)
    order = forward_order(dense, few)
    made = fit_layers(
        student,
        reference,
        order,
        {name: option for name, option in shared.chosen.items() if option.sources},
        found,
        {name: shape.macs for name, shape in shapes.items()},
        calibration,
        refit=refit,
        progress=progress,
    )
    if between is not None:
        made = insert_between(student, made, calibration, between)
    # The rebuilt channels vary less than the dense ones (least squares shrinks): measured again.
    measure_batch_norm(student, calibration, calibration.part)
    if refit:
        refit_heads(student, reference, calibration)
    after = count(student, input_shape, few)
    latency = None
    costs: list[float] = [cost.macs, after.macs]
    if budget.kind == "params":
        costs = [cost.params, after.params]
    elif shared.timed is not None:
        ready = [for_inference(dense), for_inference(student)]
        costs = latencies(ready, input_shape, batch=table.batch)
        latency = Latency(
            machine=environment(convolution(dense, candidates[0]).weight),
            batch=table.batch,
            ms_before=round(costs[0], 4),
            ms_after=round(costs[1], 4),
        )
    if budget.unit != "ms":
        budget.check(costs[1], costs[0])
    spending = Spending(
        budget=budget,
        search=search,
        options=shared.options,
        chosen=shared.chosen,
        channels={name: shape.channels for name, shape in shapes.items()},
        criteria={name: ranking.told for name, ranking in found.rankings.items()},
        dense=costs[0],
        before=costs[0],
        after=costs[1],
    )
    plan = Plan(
        model=model_name,
        classes=classes,
        input_shape=input_shape,
        budget=budget.given(),
        macs_before=cost.macs,
        macs_after=after.macs,
        params_before=cost.params,
        params_after=after.params,
        latency=latency,
        criterion=criterion,
        explanation=spending.explain(reasons),
        layers=_told_layers(dense, order, made, reasons, cost, spending, shared.timed),
    )
    return student.to(dtype_of(model)), plan


def fit_layers(
    student: nn.Module,
    reference: Reference,
    order: list[str],
    chosen: Mapping[str, Option],
    found: OptionTable,
    macs: Mapping[str, int],
    images: Calibration,
    *,
    refit: bool,
    progress: Progress | None,
) -> dict[str, SBFLayer]:
    """Convert the convolutions of `student` that are `chosen`, in place, each as its option says.

    `order` are all of its convolutions in forward order, `macs` the multiply-adds of those that
    are converted; with `refit`, others that had options are mended (`SequentialFit`).
    """
    few = images.first(2)
    sizes = {
        name: chosen[name].size if name in chosen else 1
        for name in order
        if name in chosen or (refit and name in found.rows and is_mended(student, name, few))
    }
    fit = SequentialFit(student, reference, sizes, images, refit=refit)
    made: dict[str, SBFLayer] = {}
    for index, name in enumerate(order, 1):
        tell(progress, "fit layers", index, len(order))
        if name in chosen:
            option, rank = chosen[name], partial(found.order, name)
            if option.mixed:
                weights, among = found.sensitivity[name], found.rankings[name].among
                made[name] = fit.mix(name, option.kept, weights, among, macs[name])
            else:
                made[name] = fit.convert(name, rank, option.kept, option.sources, macs[name])
        elif name in sizes:
            fit.mend(name)
    return made


def _told_layers(
    dense: nn.Module,
    order: list[str],
    made: dict[str, SBFLayer],
    reasons: dict[str, str],
    cost: Cost,
    spending: Spending,
    timed: TimedChoice | None,
) -> dict[str, Layer]:
    """Return the plans of all layers, with their reasons, and their times where these decided."""
    layers: dict[str, Layer] = {}
    for name in order:
        ms = None if timed is None else timed.dense_ms.get(name)
        if name in made:
            update: dict[str, object] = {"reason": spending.reason(name)}
            if ms is not None:
                after = round(spending.chosen[name].cost, 4)
                update |= {"ms_before": round(ms, 4), "ms_after": after}
            layers[name] = made[name].model_copy(update=update)
        else:
            layers[name] = DenseLayer(
                reason=reasons[name] if name in reasons else spending.reason(name),
                macs=cost.layers[name],
                ms=None if ms is None else round(ms, 4),
                convertible=name not in reasons,
            )
    for name, module in dense.named_modules():
        if isinstance(module, nn.Conv2d) and name not in layers:
            layers[name] = DenseLayer(reason=NEVER_REACHED, macs=0, convertible=False)
    return layers


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def _nothing_to_convert(model: nn.Module, name: str, reasons: dict[str, str]) -> UserError:
    """Return the error that lists, with counts, why no convolution can be converted."""
    found = Counter(reasons.values())
    unreached = sum(isinstance(module, nn.Conv2d) for module in model.modules()) - len(reasons)
    if unreached:
        found[NEVER_REACHED] = unreached
    listed = [f"{number} of them: {reason}" for reason, number in found.most_common(LISTED)]
    if len(found) > LISTED:
        listed.append(f"{len(found) - LISTED} other reasons")
    return UserError(
        f"model {name!r} has no convolution that an SBF layer could replace; {'; '.join(listed)}"
    )


def _check_dense(model: nn.Module, name: str) -> None:
    for layer, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule":
            raise UserError(
                f"model {name!r} is compiled by torch.compile: give the network inside, "
                "model._orig_mod"
            )
        if isinstance(module, SBFConv2d):
            raise UserError(
                f"model {name!r} has an SBF layer already ({layer}): "
                "sbf_dist.compression.progressive.shrink makes it smaller"
            )


def _check_finite(model: nn.Module, name: str) -> None:
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        if not tensor.isfinite().all():
            what = "NaN" if tensor.isnan().any() else "infinity"
            layer, _, kind = key.rpartition(".")
            raise UserError(
                f"model {name!r} has {what} in layer {layer} ({kind}): its weights must be numbers"
            )
