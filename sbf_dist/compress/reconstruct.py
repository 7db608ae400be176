"""From a dense network to a fitted SBF network: plan by budget, then fit layer by layer.

The layers are fitted in forward order, each on the inputs that the layers converted before it
produce, towards the dense network's outputs, so that later layers mend what earlier ones spoil.
"""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from sbf_dist.compress.allocation import share_out
from sbf_dist.compress.budget import Budget, Option
from sbf_dist.compress.calibration import BATCH, Calibration, device_of
from sbf_dist.compress.candidates import convolution, find_candidates, forward_order
from sbf_dist.compress.cost import Cost, count
from sbf_dist.compress.criteria import Criterion, Ranking, rankings
from sbf_dist.compress.explanation import Spending
from sbf_dist.compress.fitting import install
from sbf_dist.compress.latency import latencies
from sbf_dist.compress.latency_budget import TimedChoice
from sbf_dist.compress.latency_table import LatencyTable, environment
from sbf_dist.compress.options import PROBES, Search, layer_options
from sbf_dist.compress.plan import DenseLayer, Latency, Layer, Plan, SBFLayer
from sbf_dist.compress.reference import Reference
from sbf_dist.compress.statistics import (
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
) -> tuple[nn.Module, Plan]:
    """Convert `model` to a fitted SBF network within `budget`.

    `images` (N, C, H, W), or a Calibration of them, are normalised; labels are not needed. Layers
    are fitted to the outputs of `reference`, the network that `model` was narrowed from (`model`
    itself, if that is None). `sources` is the largest S, `transform_size` the largest m, beside
    which 1 is tried (only 1 in layers of more than LARGEST_GRAM / m² channels, whose Gram matrices
    would be too large); `floor` is the least share of a layer's channels that is kept, in multiples
    of `round_to`; `keep` are patterns of layers' names to leave alone, `criterion` decides which
    channels are kept (`criteria`),
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
    calibration = Calibration.of(images, device=device_of(model))
    input_shape, few = calibration.shape, calibration.first(2)
    cost = count(dense, input_shape)
    # The least that rebuilding a channel takes is one tap.
    reasons, candidates = find_candidates(dense, few, 1, keep)
    if not candidates:
        raise UserError(f"model {model_name!r} has no convolution that an SBF layer could replace")

    def batches() -> Iterator[Tensor]:
        return calibration.parts(calibration.part)

    sensitivity = output_sensitivity(dense, candidates, batches, seed)
    ranked = rankings(dense, candidates, batches, criterion, seed)
    options: dict[str, list[Option]] = {}
    for index, name in enumerate(candidates, 1):
        _tell(progress, "measure layers", index, len(candidates))
        size = max(search.sizes(convolution(dense, name)))
        options[name] = layer_options(
            dense,
            name,
            gather_moments(_own_outputs(dense, name, batches()), size),
            calibration.first(PROBES),
            cost.layers[name],
            sensitivity[name],
            ranked[name],
            search,
        )
    table = table or LatencyTable()
    for_inference = for_inference or _as_it_is
    shared = share_out(
        dense,
        options,
        cost,
        budget,
        few[:1],
        table,
        for_inference,
        lambda done, of: _tell(progress, "measure latency", done, of),
    )
    student = copy.deepcopy(dense)
    layers: dict[str, Layer] = {}
    order = forward_order(dense, few)
    reference = reference or Reference(dense)
    for index, name in enumerate(order, 1):
        _tell(progress, "fit layers", index, len(order))
        option = shared.chosen.get(name)
        if option is not None and option.sources:
            layers[name] = fit_layer(
                reference, student, name, batches, option, sensitivity[name], ranked[name], cost
            )
        else:
            layers[name] = DenseLayer(
                reason=reasons.get(name, ""), macs=cost.layers[name], convertible=option is not None
            )
    for name, module in dense.named_modules():
        if isinstance(module, nn.Conv2d) and name not in layers:
            layers[name] = DenseLayer(
                reason="no forward pass in evaluation mode reaches it", macs=0, convertible=False
            )
    # The rebuilt channels vary less than the dense ones (least squares shrinks): measured again.
    measure_batch_norm(student, calibration, BATCH)
    after = count(student, input_shape)
    latency = None
    before_and_after: list[float] = [cost.macs, after.macs]
    if budget.kind == "params":
        before_and_after = [cost.params, after.params]
    elif shared.timed is not None:
        ready = [for_inference(dense), for_inference(student)]
        before_and_after = latencies(ready, input_shape, batch=table.batch)
        latency = Latency(
            machine=environment(convolution(dense, candidates[0]).weight),
            batch=table.batch,
            ms_before=round(before_and_after[0], 4),
            ms_after=round(before_and_after[1], 4),
        )
    spending = Spending(
        budget=budget,
        search=search,
        options=shared.options,
        chosen=shared.chosen,
        channels={name: convolution(dense, name).out_channels for name in candidates},
        criteria={name: ranked[name].told for name in candidates},
        dense=before_and_after[0],
        before=before_and_after[0],
        after=before_and_after[1],
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
        layers=_explained(layers, spending, shared.timed),
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


def _own_outputs(
    model: nn.Module, name: str, batches: Iterator[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs of a convolution, without and with its bias, batch by batch."""
    bias = convolution(model, name).bias
    for batch in batches:
        outputs = run_until(model, name, batch, output=True)
        yield outputs - (0.0 if bias is None else bias[:, None, None]), outputs


def fit_layer(
    reference: Reference,
    student: nn.Module,
    name: str,
    batches: Callable[[], Iterator[Tensor]],
    option: Option,
    sensitivity: Tensor,
    ranking: Ranking,
    cost: Cost,
) -> SBFLayer:
    """Convert one layer of `student` in place, fitted on the inputs that `student` gives it."""
    conv = convolution(student, name)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches():
            inputs = run_until(student, name, batch, output=False)
            # The basis of an SBF layer has no bias, so the candidates have none either.
            candidates = conv._conv_forward(inputs, conv.weight, None)
            wanted = run_until(reference.module, name, batch, output=True)
            yield candidates, reference.select(name, wanted)

    moments = gather_moments(pairs(), option.size)
    kept = sorted(ranking.order(moments, sensitivity)[: option.kept])
    return install(student, name, moments, kept, option.sources, cost.layers[name])
