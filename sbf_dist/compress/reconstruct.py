"""From a dense network to a fitted SBF network: plan by budget, then fit layer by layer.

The layers are fitted in forward order, each on the inputs that the layers converted before it
produce, towards the dense network's outputs, so that later layers mend what earlier ones spoil.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from sbf_dist.compress.budget import Budget, Option, allocate
from sbf_dist.compress.calibration import Calibration, device_of
from sbf_dist.compress.candidates import convolution, find_candidates, forward_order, size_for
from sbf_dist.compress.cost import Cost, count
from sbf_dist.compress.divergence import divergences
from sbf_dist.compress.fitting import rank_channels
from sbf_dist.compress.latency import latencies
from sbf_dist.compress.latency_budget import TimedChoice, allocate_time
from sbf_dist.compress.latency_table import LatencyTable, environment
from sbf_dist.compress.layerwise import gather_layers
from sbf_dist.compress.options import PROBES, Estimated, estimate_options
from sbf_dist.compress.plan import DenseLayer, Latency, Layer, Plan, SBFLayer
from sbf_dist.compress.reference import Reference
from sbf_dist.compress.refit import is_mended, refit_heads
from sbf_dist.compress.sequential import SequentialFit
from sbf_dist.compress.statistics import (
    measure_batch_norm,
    output_sensitivity,
)
from sbf_dist.errors import UserError

FISHER = 256  # images on which sensitivities are measured

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
    seed: int = 0,
    progress: Progress | None = None,
    table: LatencyTable | None = None,
    for_inference: Callable[[nn.Module], nn.Module] | None = None,
    reference: Reference | None = None,
    refit: bool = True,
) -> tuple[nn.Module, Plan]:
    """Convert `model` to a fitted SBF network within `budget`.

    `images` (N, C, H, W), or a Calibration of them, are normalised; labels are not needed. Layers
    are fitted to the outputs of `reference`, the network that `model` was narrowed from (`model`
    itself, if that is None). `sources` is
    the largest S, `transform_size` m (1 in layers of more than LARGEST_GRAM / m² channels, whose
    Gram matrices would be too large), `floor` the least share of a layer's channels that is kept,
    `progress` is told (what, done, of). With a budget of time, layers and networks are measured on
    the model's device at the images' size: `table` keeps the layers' latencies and says how many
    images are in a forward pass, and a network is measured as `for_inference` makes it (as it is,
    if that is None). With `refit`, the filters that are kept, those of layers that stay dense and
    linear layers are solved anew on what the converted layers before them give (`refit`). Returns
    the network in eval mode and its plan. Raises UserError if the budget cannot be met, a weight is
    not finite, or nothing can be converted.
    """
    _check_finite(model, model_name)
    dense = copy.deepcopy(model).eval()
    calibration = Calibration.of(images, device=device_of(model))
    reference = reference or Reference(dense)
    input_shape = calibration.shape
    cost = count(dense, input_shape)
    few = calibration.first(2)
    reasons, candidates = find_candidates(dense, few, transform_size)
    if not candidates:
        raise UserError(f"model {model_name!r} has no convolution that an SBF layer could replace")

    sizes = {name: size_for(convolution(dense, name), transform_size) for name in candidates}
    sensitivity = _sensitivity(dense, candidates, calibration, seed, progress)
    options = _options(dense, sizes, calibration, cost, sensitivity, sources, floor, seed, progress)
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
            sizes,
            few[:1],
            budget,
            table,
            for_inference,
            lambda done, of: _tell(progress, "measure latency", done, of),
        )
        chosen = timed.options

    student = copy.deepcopy(dense)
    order = forward_order(dense, few)
    converted = {name for name in order if name in chosen and chosen[name].sources}
    fitted = {
        name: sizes[name] if name in converted else 1
        for name in order
        if name in converted or (refit and is_mended(dense, name, few))
    }
    fit = SequentialFit(student, reference, fitted, calibration, refit=refit)
    layers: dict[str, Layer] = {}
    for index, name in enumerate(order, 1):
        _tell(progress, "fit layers", index, len(order))
        if name in converted:
            layers[name] = fit.convert(
                name,
                partial(rank_channels, weights=sensitivity[name]),
                chosen[name].kept,
                chosen[name].sources,
                cost.layers[name],
            )
            continue
        if name in fitted:
            fit.mend(name)
        layers[name] = DenseLayer(
            reason=reasons.get(name, "the budget is better spent by shrinking other layers"),
            macs=cost.layers[name],
            convertible=name not in reasons,
        )
    for name, module in dense.named_modules():
        if isinstance(module, nn.Conv2d) and name not in layers:
            layers[name] = DenseLayer(
                reason="no forward pass in evaluation mode reaches it", macs=0, convertible=False
            )
    if timed is not None:
        layers |= {name: _with_time(name, layers[name], timed) for name in chosen}
    # The rebuilt channels vary less than the dense ones (least squares shrinks): measured again.
    measure_batch_norm(student, calibration, calibration.part)
    if refit:
        refit_heads(student, reference.module, calibration)
    after = count(student, input_shape)
    latency = None
    if timed is not None:
        ready = [for_inference(dense), for_inference(student)]
        ms_before, ms_after = latencies(ready, input_shape, batch=table.batch)
        latency = Latency(
            machine=environment(convolution(dense, candidates[0]).weight),
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


def _sensitivity(
    dense: nn.Module,
    names: list[str],
    images: Calibration,
    seed: int,
    progress: Progress | None,
) -> dict[str, Tensor]:
    def batches() -> Iterator[Tensor]:
        return _told(progress, "measure sensitivities", images, FISHER)

    return output_sensitivity(dense, names, batches, seed)


def _options(
    dense: nn.Module,
    sizes: dict[str, int],
    images: Calibration,
    cost: Cost,
    sensitivity: dict[str, Tensor],
    sources: int,
    floor: float,
    seed: int,
    progress: Progress | None,
) -> dict[str, list[Option]]:
    """Return the options of all layers; the first of each is the layer as it is."""
    estimated: dict[str, Estimated] = {}
    for index, (name, moments) in enumerate(gather_layers(dense, sizes, images), 1):
        _tell(progress, "measure layers", index, len(sizes))
        estimated[name] = estimate_options(
            dense, name, moments, cost.layers[name], sensitivity[name], sources, floor
        )
    trials = {name: row.trials for name, row in estimated.items() if row.trials}
    batches = _told(progress, "measure divergences", images, PROBES)
    measured = divergences(dense, trials, batches, seed=seed)
    return {
        name: [
            Option(convolution(dense, name).out_channels, 0, cost.layers[name], 0.0),
            *row.scaled(measured.get(name, [])),
        ]
        for name, row in estimated.items()
    }


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


def _told(
    progress: Progress | None, what: str, images: Calibration, first: int
) -> Iterator[Tensor]:
    """Give the first images for passes with gradients, and tell how far that is."""
    done, of = 0, min(first, images.count)
    # A graph of gradients is about as large again as the features.
    for part in images.parts(images.part // 2 or 1, first):
        _tell(progress, what, done, of)
        yield part
        done += len(part)
    _tell(progress, what, of, of)


def _check_finite(model: nn.Module, name: str) -> None:
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            what = "NaN" if tensor.isnan().any() else "infinity"
            layer, _, kind = key.rpartition(".")
            raise UserError(
                f"model {name!r} has {what} in layer {layer} ({kind}): its weights must be numbers"
            )
