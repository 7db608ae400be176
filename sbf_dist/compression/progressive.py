"""Shrinking a network that has SBF layers already: in rounds, with training between."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sbf_dist.budget import Budget
from sbf_dist.compression.calibration import Calibration, calibration_for, dtype_of
from sbf_dist.compression.candidates import find_candidates, forward_order
from sbf_dist.compression.cost import count
from sbf_dist.compression.fitting.layerwise import layer_of
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.refit import refit_heads
from sbf_dist.compression.fitting.statistics import measure_batch_norm
from sbf_dist.compression.plan import DenseLayer, Layer, Plan, SBFLayer
from sbf_dist.compression.planning.criteria import Criterion
from sbf_dist.compression.planning.explanation import Spending
from sbf_dist.compression.planning.knapsack import Option, allocate
from sbf_dist.compression.planning.option_table import measure_options
from sbf_dist.compression.planning.options import Search, Shape
from sbf_dist.compression.precision import working_copy, working_reference
from sbf_dist.compression.progress import Progress
from sbf_dist.compression.reconstruct import fit_layers
from sbf_dist.errors import UserError
from sbf_dist.layers import SBFConv2d
from sbf_dist.surgery import become, deep_copy


def round_budgets(final: Budget, rounds: int, dense: float | None = None) -> list[Budget]:
    """Return the budgets of so many rounds, the last of which is `final`.

    The share that is taken away grows cubically, fast at first, when there is much that is not
    needed (Zhu and Gupta 2017, arXiv 1710.01878, equation 1): after round r of R the share left is
    1 - (1 - final) (1 - (1 - r / R)³). `dense` is the dense network's cost, needed where `final` is
    a number. Raises UserError for more than one round to a budget of time.
    """
    if rounds == 1:
        return [final]
    if final.unit == "ms":
        raise UserError(
            f"rounds = {rounds} needs a budget of macs or params, not {final.kind} = "
            f"{final.value:g}"
        )
    share = final.value
    if not final.is_share():
        assert dense is not None, "a budget that is a number is a share of the dense cost only"
        share = final.limit(dense) / dense
    left = [1 - (1 - share) * (1 - (1 - r / rounds) ** 3) for r in range(1, rounds)]
    return [*(Budget(**{final.kind: part}) for part in left), final]


@torch.no_grad()
def shrink(
    student: nn.Module,
    plan: Plan,
    images: Tensor | Calibration,
    budget: Budget,
    *,
    sources: int = 4,
    transform_size: int = 3,
    floor: float = 0.125,
    round_to: int = 1,
    keep: Sequence[str] = (),
    criterion: Criterion = "reconstruction",
    seed: int = 0,
    progress: Progress | None = None,
    reference: Reference | None = None,
    refit: bool = True,
    mixtures: bool = True,
) -> tuple[nn.Module, Plan]:
    """Make `student`, which `plan` made and training may have changed, fit a smaller budget.

    `budget`, of multiply-adds or parameters, is of the dense network, as it was in the first plan.
    The basis of an SBF layer loses channels, which are then rebuilt; what was rebuilt stays so,
    and is fitted to the new basis. Dense layers may become SBF layers. Layers are fitted to the
    outputs of `reference`, a network with the same layers (the student itself, as it is, if that
    is None). The other arguments are those of `compress`; layers that `keep` names stay as they
    are. Returns a network in eval mode, and its plan, which makes it of the dense network. Raises
    UserError if the budget cannot be met or is one of time.
    """
    if budget.unit == "ms":
        raise UserError(
            f"a network that has SBF layers cannot be shrunk to {budget.kind} = {budget.value:g}: "
            "give macs or params"
        )
    for name, layer in plan.layers.items():
        if isinstance(layer, SBFLayer) and layer.between is not None:
            raise UserError(
                f"layer {name} has {layer.between} between basis and transformations: it cannot be "
                "shrunk again"
            )
    now = working_copy(student)
    calibration = calibration_for(now, images)
    dense = unfolded(now)
    few = calibration.first(2)
    reasons, candidates = find_candidates(dense, few, 1, keep)
    cost = count(now, calibration.shape, few)
    shapes = {name: _shape(now, plan, name, cost.layers[name]) for name in candidates}
    search = Search(sources, transform_size, floor, round_to, mixtures=mixtures and refit)
    found = measure_options(
        now,
        shapes,
        {name: _as_it_is(now, name, shape) for name, shape in shapes.items()},
        calibration,
        search=search,
        criterion=criterion,
        seed=seed,
        among={n: m.kept for n in candidates if isinstance(m := layer_of(now, n), SBFConv2d)},
        progress=progress,
    )
    rows, before, whole = found.rows, cost.macs, plan.macs_before
    if budget.kind == "params":
        rows = {name: shapes[name].in_parameters(row) for name, row in rows.items()}
        before, whole = cost.params, plan.params_before
    fixed = before - sum(row[0].cost for row in rows.values())
    chosen = allocate(rows, fixed=fixed, dense=whole, budget=budget)

    changed = {name: option for name, option in chosen.items() if option != rows[name][0]}
    reference = Reference(now) if reference is None else working_reference(reference)
    smaller = deep_copy(now)
    for name in changed:
        become(smaller.get_submodule(name), deep_copy(dense.get_submodule(name)))
    made = fit_layers(
        smaller,
        reference,
        [n for n in forward_order(dense, few) if n in changed or _is_dense(now, n)],
        changed,
        found,
        {name: shapes[name].macs for name in changed},
        calibration,
        refit=refit,
        progress=progress,
    )
    measure_batch_norm(smaller, calibration, calibration.part)
    if refit:
        refit_heads(smaller, reference, calibration)
    after = count(smaller, calibration.shape, few)
    reached = after.params if budget.kind == "params" else after.macs
    budget.check(reached, whole)
    spending = Spending(
        budget=budget,
        search=search,
        options=rows,
        chosen=chosen,
        channels={name: shape.channels for name, shape in shapes.items()},
        criteria={name: ranking.told for name, ranking in found.rankings.items()},
        dense=whole,
        before=before,
        after=reached,
    )
    update = {
        "format": 2,
        "budget": budget.given(),
        "macs_after": after.macs,
        "params_after": after.params,
        "latency": None,
        "criterion": criterion,
        "explanation": spending.explain(reasons),
        "layers": _layers(plan, made, reasons, spending),
    }
    return smaller.to(dtype_of(student)), plan.model_copy(update=update)


def unfolded(student: nn.Module) -> nn.Module:
    """Return a copy in which convolutions stand for SBF layers: the filters that are left, and 0.

    Its layers have the names, shapes and filters of the dense network's; its outputs are no use.
    """
    dense = deep_copy(student)
    for layer in list(dense.modules()):
        if isinstance(layer, SBFConv2d):
            become(layer, _convolution(layer))
    return dense


def _convolution(layer: SBFConv2d) -> nn.Conv2d:
    weight = layer.basis.weight
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        groups=layer.groups,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[list(layer.kept)] = weight
        if conv.bias is not None and layer.bias is not None:
            conv.bias.copy_(layer.bias)
    conv.weight.requires_grad_(weight.requires_grad)
    return conv.train(layer.training)


def _is_dense(model: nn.Module, name: str) -> bool:
    return isinstance(layer_of(model, name), nn.Conv2d)


def _shape(model: nn.Module, plan: Plan, name: str, macs: int) -> Shape:
    """Describe the dense convolution that a layer of `model`, of `macs` multiply-adds, was."""
    layer, planned = layer_of(model, name), plan.layers.get(name)
    if isinstance(layer, nn.Conv2d):
        return Shape.of(layer, macs)
    if not isinstance(planned, SBFLayer):
        raise UserError(f"plan does not make {name} an SBF layer: it is another network's")
    weights = layer.basis.weight[0].numel()
    params = layer.out_channels * weights + (0 if layer.bias is None else layer.out_channels)
    return Shape(layer.out_channels, weights, planned.macs_before, params)


def _as_it_is(model: nn.Module, name: str, shape: Shape) -> Option:
    layer = layer_of(model, name)
    if isinstance(layer, nn.Conv2d):
        return shape.as_it_is()
    kept, used, size = len(layer.kept), layer.sources.shape[1], layer.transform_size
    cost = shape.option_macs(kept, used, size)
    return Option(kept, used, size, cost, loss=0.0, mixed=size == 1 and used == kept)


def _layers(
    plan: Plan, made: dict[str, SBFLayer], reasons: dict[str, str], spending: Spending
) -> dict[str, Layer]:
    """Return the plans of all layers: `made` ones are new, the others have new reasons."""
    layers = dict(plan.layers)
    for name, layer in plan.layers.items():
        if name in spending.chosen:
            planned = made.get(name, layer)
            layers[name] = planned.model_copy(update={"reason": spending.reason(name)})
        elif name in reasons and isinstance(layer, DenseLayer):
            layers[name] = layer.model_copy(update={"reason": reasons[name]})
    return layers
