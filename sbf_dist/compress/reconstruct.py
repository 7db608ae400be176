"""From a dense network to a fitted SBF network: plan by budget, then fit layer by layer.

The layers are fitted in forward order, each on the inputs that the layers converted before it
produce, towards the dense network's outputs, so that later layers mend what earlier ones spoil.
"""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from sbf_dist.compress.budget import Budget, Option, allocate
from sbf_dist.compress.candidates import convolution, find_candidates, forward_order
from sbf_dist.compress.cost import Cost, count
from sbf_dist.compress.criteria import Criterion, Ranking, rankings
from sbf_dist.compress.explanation import Spending
from sbf_dist.compress.fitting import install
from sbf_dist.compress.latency import latencies
from sbf_dist.compress.latency_budget import TimedChoice, allocate_time
from sbf_dist.compress.latency_table import LatencyTable, environment
from sbf_dist.compress.options import PROBES, Search, in_parameters, layer_options
from sbf_dist.compress.plan import DenseLayer, Latency, Layer, Plan, SBFLayer
from sbf_dist.compress.statistics import (
    BATCH,
    gather_moments,
    measure_batch_norm,
    output_sensitivity,
    run_until,
)
from sbf_dist.errors import UserError
from sbf_dist.layers import SBFConv2d

Progress = Callable[[str, int, int], None]


@torch.no_grad()
def compress(
    model: nn.Module,
    images: Tensor,
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
) -> tuple[nn.Module, Plan]:
    """Convert `model` to a fitted SBF network within `budget`.

    `images` (N, C, H, W) are normalised calibration images; labels are not needed. `sources` is
    the largest S, `transform_size` the largest m, beside which 1 is tried (only 1 in layers of
    more than LARGEST_GRAM / m² channels, whose Gram matrices would be too large); `floor` is the
    least share of a layer's channels that is kept, in multiples of `round_to`; `keep` are patterns
    of layers' names to leave alone, `criterion` decides which channels are kept (`criteria`),
    `progress` is told (what, done, of). With a budget of time, layers and networks are measured on
    the model's device at the images' size: `table` keeps the layers' latencies and says how many
    images are in a forward pass, and a network is measured as `for_inference` makes it (as it is,
    if that is None). Returns the network in eval mode and its plan. Raises UserError if the budget
    cannot be met, a weight is not finite, nothing can be converted, or the network has SBF layers
    already.
    """
    _check_finite(model, model_name)
    _check_dense(model, model_name)
    search = Search(sources, transform_size, floor, round_to)
    dense = copy.deepcopy(model).eval()
    input_shape = (images.shape[1], images.shape[2], images.shape[3])
    cost = count(dense, input_shape)
    # The least that rebuilding a channel takes is one tap.
    reasons, candidates = find_candidates(dense, images, 1)
    if not candidates:
        raise UserError(f"model {model_name!r} has no convolution that an SBF layer could replace")

    def batches() -> Iterator[Tensor]:
        return iter(images.split(BATCH))

    sensitivity = output_sensitivity(dense, candidates, batches, seed)
    ranked = rankings(dense, candidates, batches, criterion, seed)
    options: dict[str, list[Option]] = {}
    for index, name in enumerate(candidates, 1):
        _tell(progress, "measure layers", index, len(candidates))
        size = max(search.sizes(convolution(dense, name)))
        options[name] = layer_options(
            dense,
            name,
            gather_moments(_own_outputs(dense, name, images), size),
            images[:PROBES],
            cost.layers[name],
            sensitivity[name],
            ranked[name],
            search,
        )
    table = table or LatencyTable()
    for_inference = for_inference or _as_it_is
    timed: TimedChoice | None = None
    if budget.unit == "ms":
        timed = allocate_time(
            dense,
            options,
            images[:1],
            budget,
            table,
            for_inference,
            lambda done, of: _tell(progress, "measure latency", done, of),
        )
        options, chosen = timed.priced, timed.options
    else:
        whole = cost.macs
        if budget.kind == "params":
            whole = cost.params
            options = {n: in_parameters(convolution(dense, n), row) for n, row in options.items()}
        fixed = whole - sum(row[0].cost for row in options.values())
        chosen = allocate(options, fixed=fixed, dense=whole, budget=budget)

    student = copy.deepcopy(dense)
    layers: dict[str, Layer] = {}
    order = forward_order(dense, images)
    for index, name in enumerate(order, 1):
        _tell(progress, "fit layers", index, len(order))
        if name in chosen and chosen[name].sources:
            layers[name] = _fit_layer(
                dense, student, name, images, chosen[name], sensitivity[name], ranked[name], cost
            )
        else:
            layers[name] = DenseLayer(
                reason=reasons.get(name, ""), macs=cost.layers[name], convertible=name in chosen
            )
    for name, module in dense.named_modules():
        if isinstance(module, nn.Conv2d) and name not in layers:
            layers[name] = DenseLayer(
                reason="no forward pass in evaluation mode reaches it", macs=0, convertible=False
            )
    # The rebuilt channels vary less than the dense ones (least squares shrinks): measured again.
    measure_batch_norm(student, images, BATCH)
    after = count(student, input_shape)
    costs: list[float] = [cost.macs, after.macs]
    if budget.kind == "params":
        costs = [cost.params, after.params]
    latency = None
    if timed is not None:
        ready = [for_inference(dense), for_inference(student)]
        ms_before, ms_after = latencies(ready, input_shape, batch=table.batch)
        costs = [ms_before, ms_after]
        latency = Latency(
            machine=environment(convolution(dense, candidates[0]).weight),
            batch=table.batch,
            ms_before=round(ms_before, 4),
            ms_after=round(ms_after, 4),
        )
    spending = Spending(
        budget=budget,
        search=search,
        options=options,
        chosen=chosen,
        channels={name: convolution(dense, name).out_channels for name in candidates},
        criteria={name: ranked[name].told for name in candidates},
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
        layers=_explained(layers, spending, timed),
    )
    return student, plan


def _explained(
    layers: dict[str, Layer], spending: Spending, timed: TimedChoice | None
) -> dict[str, Layer]:
    """Return the plans of layers with their reasons, and with their times where these decided."""
    told = dict(layers)
    for name, option in spending.chosen.items():
        update: dict[str, object] = {"reason": spending.reason(name)}
        if timed is not None:
            before, after = round(timed.dense_ms[name], 4), round(option.cost, 4)
            if isinstance(layers[name], SBFLayer):
                update |= {"ms_before": before, "ms_after": after}
            else:
                update["ms"] = before
        told[name] = layers[name].model_copy(update=update)
    return told


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def _tell(progress: Progress | None, what: str, done: int, of: int) -> None:
    if progress is not None:
        progress(what, done, of)


def _check_dense(model: nn.Module, name: str) -> None:
    for layer, module in model.named_modules():
        if isinstance(module, SBFConv2d):
            raise UserError(
                f"model {name!r} has an SBF layer already ({layer}): "
                "sbf_dist.compress.progressive.shrink makes it smaller"
            )


def _check_finite(model: nn.Module, name: str) -> None:
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            what = "NaN" if tensor.isnan().any() else "infinity"
            layer, _, kind = key.rpartition(".")
            raise UserError(
                f"model {name!r} has {what} in layer {layer} ({kind}): its weights must be numbers"
            )


def _own_outputs(model: nn.Module, name: str, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs of a convolution, without and with its bias, batch by batch."""
    bias = convolution(model, name).bias
    for batch in images.split(BATCH):
        outputs = run_until(model, name, batch, output=True)
        yield outputs - (0.0 if bias is None else bias[:, None, None]), outputs


def _fit_layer(
    dense: nn.Module,
    student: nn.Module,
    name: str,
    images: Tensor,
    option: Option,
    sensitivity: Tensor,
    ranking: Ranking,
    cost: Cost,
) -> SBFLayer:
    """Convert one layer of `student` in place, fitted on the inputs that `student` gives it."""
    conv = convolution(dense, name)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in images.split(BATCH):
            inputs = run_until(student, name, batch, output=False)
            # The basis of an SBF layer has no bias, so the candidates have none either.
            candidates = conv._conv_forward(inputs, conv.weight, None)
            yield candidates, run_until(dense, name, batch, output=True)

    moments = gather_moments(pairs(), option.size)
    kept = sorted(ranking.order(moments, sensitivity)[: option.kept])
    return install(student, name, moments, kept, option.sources, cost.layers[name])
