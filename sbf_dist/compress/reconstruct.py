"""From a dense network to a fitted SBF network: plan by budget, then fit layer by layer.

The layers are fitted in forward order, each on the inputs that the layers converted before it
produce, towards the dense network's outputs, so that later layers mend what earlier ones spoil.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.compress.budget import Budget, Option, allocate
from sbf_dist.compress.convert import replace
from sbf_dist.compress.cost import Cost, count
from sbf_dist.compress.fitting import fit_transforms, rank_channels
from sbf_dist.compress.latency import latencies
from sbf_dist.compress.latency_budget import TimedChoice, allocate_time
from sbf_dist.compress.latency_table import LatencyTable, environment
from sbf_dist.compress.plan import DenseLayer, Latency, Layer, Plan, SBFLayer
from sbf_dist.compress.statistics import (
    Moments,
    gather_moments,
    measure_batch_norm,
    output_sensitivity,
    run_until,
)
from sbf_dist.errors import UserError

BATCH = 64  # calibration images at a time; bounds the memory
LARGEST_GRAM = 4608  # shifted channels in a layer's Gram matrix: 512 channels with m = 3
PROBES = 128  # images on which the effect of an option is measured

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
    seed: int = 0,
    progress: Progress | None = None,
    table: LatencyTable | None = None,
    for_inference: Callable[[nn.Module], nn.Module] | None = None,
) -> tuple[nn.Module, Plan]:
    """Convert `model` to a fitted SBF network within `budget`.

    `images` (N, C, H, W) are normalised calibration images; labels are not needed. `sources` is
    the largest S, `transform_size` m (1 in layers of more than LARGEST_GRAM / m² channels, whose
    Gram matrices would be too large), `floor` the least share of a layer's channels that is kept,
    `progress` is told (what, done, of). With a budget of time, layers and networks are measured on
    the model's device at the images' size: `table` keeps the layers' latencies and says how many
    images are in a forward pass, and a network is measured as `for_inference` makes it (as it is,
    if that is None). Returns the network in eval mode and its plan. Raises UserError if the budget
    cannot be met, a weight is not finite, or nothing can be converted.
    """
    _check_finite(model, model_name)
    dense = copy.deepcopy(model).eval()
    input_shape = (images.shape[1], images.shape[2], images.shape[3])
    cost = count(dense, input_shape)
    reasons, candidates = _candidates(dense, images, transform_size)
    if not candidates:
        raise UserError(f"model {model_name!r} has no convolution that an SBF layer could replace")

    def batches() -> Iterator[Tensor]:
        return iter(images.split(BATCH))

    sensitivity = output_sensitivity(dense, candidates, batches, seed)
    options: dict[str, list[Option]] = {}
    for index, name in enumerate(candidates, 1):
        _tell(progress, "measure layers", index, len(candidates))
        options[name] = _options(
            dense, name, images, cost, sensitivity[name], sources, transform_size, floor
        )
    table = table or LatencyTable()
    for_inference = for_inference or _as_it_is
    timed: TimedChoice | None = None
    if budget.macs is not None:
        fixed = cost.macs - sum(cost.layers[name] for name in candidates)
        chosen = allocate(options, fixed=fixed, dense=cost.macs, budget=budget)
    else:
        timed = allocate_time(
            dense,
            options,
            {name: _size_for(_convolution(dense, name), transform_size) for name in candidates},
            images[:1],
            budget,
            table,
            for_inference,
            lambda done, of: _tell(progress, "measure latency", done, of),
        )
        chosen = timed.options

    student = copy.deepcopy(dense)
    layers: dict[str, Layer] = {}
    order = forward_order(dense, images)
    for index, name in enumerate(order, 1):
        _tell(progress, "fit layers", index, len(order))
        if name in reasons:
            layers[name] = DenseLayer(
                reason=reasons[name], macs=cost.layers[name], convertible=False
            )
        elif chosen[name].sources == 0:
            layers[name] = DenseLayer(
                reason="the budget is better spent by shrinking other layers",
                macs=cost.layers[name],
                convertible=True,
            )
        else:
            layers[name] = _fit_layer(
                dense, student, name, images, chosen[name], sensitivity[name], transform_size, cost
            )
        if timed is not None and name in chosen:
            layers[name] = _with_time(name, layers[name], timed)
    for name, module in dense.named_modules():
        if isinstance(module, nn.Conv2d) and name not in layers:
            layers[name] = DenseLayer(
                reason="no forward pass in evaluation mode reaches it", macs=0, convertible=False
            )
    # The rebuilt channels vary less than the dense ones (least squares shrinks): measured again.
    measure_batch_norm(student, images, BATCH)
    after = count(student, input_shape)
    latency = None
    if timed is not None:
        ready = [for_inference(dense), for_inference(student)]
        ms_before, ms_after = latencies(ready, input_shape, batch=table.batch)
        latency = Latency(
            machine=environment(_convolution(dense, candidates[0]).weight),
            batch=table.batch,
            ms_before=round(ms_before, 4),
            ms_after=round(ms_after, 4),
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
        layers=layers,
    )
    return student, plan


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def _with_time(name: str, layer: Layer, timed: TimedChoice) -> Layer:
    """Return the plan of a layer with its milliseconds, and with what they decided."""
    before, after = round(timed.dense_ms[name], 4), round(timed.options[name].cost, 4)
    if isinstance(layer, SBFLayer):
        reason = f"{layer.reason}; {before:g} -> {after:g} ms"
        return layer.model_copy(update={"ms_before": before, "ms_after": after, "reason": reason})
    reason = layer.reason
    if name in timed.never_faster:
        reason = f"no SBF form measured faster than its {before:g} ms"
    return layer.model_copy(update={"ms": before, "reason": reason})


def _tell(progress: Progress | None, what: str, done: int, of: int) -> None:
    if progress is not None:
        progress(what, done, of)


def _check_finite(model: nn.Module, name: str) -> None:
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            what = "NaN" if tensor.isnan().any() else "infinity"
            layer, _, kind = key.rpartition(".")
            raise UserError(
                f"model {name!r} has {what} in layer {layer} ({kind}): its weights must be numbers"
            )


def forward_order(model: nn.Module, images: Tensor) -> list[str]:
    """Names of the convolutions of `model` in the order in which a forward pass reaches them."""
    order: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    model(images[:2])
    for handle in handles:
        handle.remove()
    repeated = sorted({name for name in order if order.count(name) > 1})
    if repeated:
        raise UserError(
            f"layer {repeated[0]} is used {order.count(repeated[0])} times in a forward pass; "
            "an SBF layer must be used once"
        )
    return order


def _candidates(
    model: nn.Module, images: Tensor, transform_size: int
) -> tuple[dict[str, str], list[str]]:
    """Split the convolutions into those left dense, with the reason, and those to convert."""
    reasons: dict[str, str] = {}
    candidates: list[str] = []
    for name in forward_order(model, images):
        conv = _convolution(model, name)
        filter_cost = conv.weight[0].numel()
        size = _size_for(conv, transform_size)
        if type(conv) is not nn.Conv2d:
            reasons[name] = f"{type(conv).__name__} is not a plain convolution"
        elif conv.groups > 1:
            reasons[name] = f"grouped convolution ({conv.groups} groups)"
        elif conv.in_channels == images.shape[1]:
            reasons[name] = "the stem: it reads the image itself"
        elif filter_cost <= size**2:
            reasons[name] = (
                f"a filter costs {filter_cost} multiply-adds, rebuilding a channel at least "
                f"{size**2}"
            )
        else:
            candidates.append(name)
    return reasons, candidates


def _convolution(model: nn.Module, name: str) -> nn.Conv2d:
    conv = model.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    return conv


def _size_for(conv: nn.Conv2d, transform_size: int) -> int:
    """Return the transformations' size in a layer: 1 where the layer is too wide to fit more."""
    return transform_size if conv.out_channels * transform_size**2 <= LARGEST_GRAM else 1


def _filter_macs(conv: nn.Conv2d, layer_macs: int) -> tuple[float, float]:
    """Multiply-adds of one filter, and of one tap of a transformation, over the whole output."""
    per_filter = layer_macs / conv.out_channels
    return per_filter, per_filter / conv.weight[0].numel()


def _options(
    dense: nn.Module,
    name: str,
    images: Tensor,
    cost: Cost,
    sensitivity: Tensor,
    sources: int,
    transform_size: int,
    floor: float,
) -> list[Option]:
    """Estimate the loss of each (kept, sources) of one layer, all others being dense.

    The summed squared errors, weighted by sensitivity, rank the options of one layer well but not
    those of different layers (errors that add up coherently over positions count for more), so
    they are scaled to the KL divergence measured with a few of the options in place.
    """
    conv = _convolution(dense, name)
    channels = conv.out_channels

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        bias = 0.0 if conv.bias is None else conv.bias[:, None, None]
        for batch in images.split(BATCH):
            outputs = run_until(dense, name, batch, output=True)
            yield outputs - bias, outputs

    size = _size_for(conv, transform_size)
    moments = gather_moments(pairs(), size)
    ranking = rank_channels(moments, sensitivity)
    per_filter, per_tap = _filter_macs(conv, cost.layers[name])
    estimated: list[Option] = []
    least = max(1, round(floor * channels))
    for kept in range(least, channels, max(1, channels // 16)):
        rebuilt = ranking[kept:]
        fit = fit_transforms(moments.restrict(ranking[:kept]), rebuilt, sources)
        losses = (sensitivity[rebuilt][:, None] * fit.error).sum(0).tolist()
        for used in range(1, len(losses) + 1):
            total = kept * per_filter + len(rebuilt) * used * size**2 * per_tap
            if total < cost.layers[name]:
                estimated.append(Option(kept, used, total, losses[used - 1]))
    dense_option = Option(kept=channels, sources=0, cost=cost.layers[name], loss=0.0)
    if not estimated:
        return [dense_option]
    probe = images[:PROBES]
    expected = dense(probe).log_softmax(1)
    scales = []
    for share in (0.25, 0.5, 0.75):
        wanted = share * cost.layers[name]
        option = min(estimated, key=lambda o: abs(o.cost - wanted))
        trial = copy.deepcopy(dense)
        _install(trial, name, moments, sorted(ranking[: option.kept]), option.sources)
        divergence = F.kl_div(
            trial(probe).log_softmax(1), expected, reduction="batchmean", log_target=True
        )
        # Rounding may leave a divergence of nothing below zero.
        scales.append((option.cost, max(float(divergence), 0.0) / max(option.loss, 1e-30)))
    scaled = [
        dataclasses.replace(o, loss=o.loss * min(scales, key=lambda s: abs(s[0] - o.cost))[1])
        for o in estimated
    ]
    return [dense_option, *scaled]


def _fit_layer(
    dense: nn.Module,
    student: nn.Module,
    name: str,
    images: Tensor,
    option: Option,
    sensitivity: Tensor,
    transform_size: int,
    cost: Cost,
) -> SBFLayer:
    """Convert one layer of `student` in place, fitted on the inputs that `student` gives it."""
    conv = _convolution(dense, name)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in images.split(BATCH):
            inputs = run_until(student, name, batch, output=False)
            # The basis of an SBF layer has no bias, so the candidates have none either.
            candidates = conv._conv_forward(inputs, conv.weight, None)
            yield candidates, run_until(dense, name, batch, output=True)

    moments = gather_moments(pairs(), _size_for(conv, transform_size))
    kept = sorted(rank_channels(moments, sensitivity)[: option.kept])
    return _install(student, name, moments, kept, option.sources, cost.layers[name])


def _install(
    model: nn.Module,
    name: str,
    moments: Moments,
    kept: list[int],
    sources: int,
    macs: int = 0,
) -> SBFLayer:
    """Put a fitted SBF layer with the basis `kept` in the place of a convolution of `model`."""
    conv = _convolution(model, name)
    size = moments.size
    rebuilt = sorted(set(range(conv.out_channels)) - set(kept))
    fit = fit_transforms(moments.restrict(kept), rebuilt, sources)
    per_filter, per_tap = _filter_macs(conv, macs)
    left = moments.drift[kept].sum() + fit.error[:, -1].sum()
    layer = SBFLayer(
        channels=conv.out_channels,
        kept=kept,
        sources=[[kept[position] for position in row] for row in fit.sources.tolist()],
        transform_size=size,
        macs_before=macs,
        macs_after=round(
            len(kept) * per_filter + len(rebuilt) * fit.sources.shape[1] * size**2 * per_tap
        ),
        error=round(float(left / moments.yy.sum().clamp(min=1e-30)), 6),
        reason=(
            f"{len(kept)} of {conv.out_channels} filters kept, {sources} sources: least "
            "estimated loss within the budget"
        ),
    )
    sbf = replace(model, name, layer)
    assert sbf.bias is not None
    sbf.transforms.copy_(fit.transforms)
    centre = size**2 // 2
    shift = moments.y_mean - moments.z_mean[centre :: size**2]
    sbf.bias[kept] = shift[kept].to(sbf.bias)
    sbf.bias[rebuilt] = fit.bias.to(sbf.bias)
    return layer
