"""Channel pruning on torch-pruning's dependency graph: magnitude, and DepGraph's importance."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from sbf_dist.compression.calibration import Calibration, Images
from sbf_dist.compression.candidates import forward_order
from sbf_dist.compression.cost import count
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.refit import is_mended, refit_heads
from sbf_dist.compression.fitting.resuming import Route
from sbf_dist.compression.fitting.sequential import SequentialFit
from sbf_dist.compression.prepared_images import calibration_for
from sbf_dist.errors import UserError
from sbf_dist.peers.batch_norms import Statistics, settle_batch_norms
from sbf_dist.peers.shrinking import in_proportion, longest_within
from sbf_dist.surgery import deep_copy, in_eval_mode

FEATURES = 512 * 2**20  # bytes of features that are kept between passes
Importance = Literal["l1", "l2", "depgraph"]
LEAST = 0.125  # share of a group's channels that stays: global orders would empty whole layers

Removal = tuple[str, int]  # a group, named after its first layer, and one of its channels


def prune(
    model: nn.Module,
    macs_share: float,
    images: Images,
    *,
    importance: Importance,
    everywhere: bool,
    compensated: bool = False,
    statistics: Statistics = "measured",
) -> nn.Module:
    """Remove channels of `model` until `macs_share` of its multiply-adds are left.

    "l1" and "l2" score a channel by the norm of its filter (Li et al. 2017, arXiv 1608.08710; in a
    group of layers that must lose the same channels, by that of the group's first layer),
    "depgraph" by all that is removed with it, filters, inputs of the layers that follow and batch
    norm, relative to the group's mean (Fang et al., CVPR 2023, section 3.3, without sparse
    training). `everywhere` ranks the channels of all layers together, else every group loses the
    same share of its own. Scores and groups are torch-pruning's. The budget is used to the last
    channel that fits. With `compensated`, the layers that read what is left are solved anew, in
    forward order, by ridge regression on `images` (N, C, H, W), calibration images (GRAIL, arXiv
    2602.23795). Batch norm is then measured again on these, or moved (`statistics`). Returns the
    smaller network in eval mode. UserError if the budget cannot be met.
    """
    dense = in_eval_mode(deep_copy(model))
    calibration = calibration_for(dense, images)
    image, shape = calibration.first(1), calibration.shape
    limit = macs_share * count(dense, shape).macs
    scores = _scores(dense, image, importance)
    order = _order(scores, everywhere)

    def cost(removed: Sequence[Removal]) -> int:
        return count(_without(dense, image, removed), shape).macs

    what = f"{importance} at {macs_share:g} of the MACs"
    removed = longest_within(order, cost, limit, what)
    network = _without(dense, image, removed)
    reference = Reference(dense, _remaining(dense, image, removed))
    if compensated:
        _compensate(network, reference, calibration)
    settle_batch_norms(network, reference, calibration, statistics)
    return network


@torch.no_grad()
def _compensate(network: nn.Module, reference: Reference, images: Calibration) -> None:
    """Solve the convolutions anew, in place and in forward order, and the linear layers."""
    pair = images.first(2)
    sizes = {name: 1 for name in forward_order(network, pair) if is_mended(network, name, pair)}
    route = Route.of(network, reference.module, images.first(3), list(sizes), FEATURES)
    fit = SequentialFit(network, reference, sizes, images, refit=True, route=route)
    for name in sizes:
        fit.mend(name)
    refit_heads(network, reference, images)


@torch.no_grad()
def _remaining(dense: nn.Module, image: Tensor, removed: Sequence[Removal]) -> dict[str, list[int]]:
    """Return the numbers in `dense` of the channels that its layers and batch norms keep."""
    marked = deep_copy(dense)
    for module in marked.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            numbers = torch.arange(len(module.weight)).to(module.weight)
            module.weight.copy_(
                numbers.view(-1, *[1] * (module.weight.ndim - 1)).expand_as(module.weight)
            )
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(torch.arange(len(module.running_mean)))
    left: dict[str, list[int]] = {}
    for name, module in _without(marked, image, removed).named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            left[name] = module.weight.flatten(1)[:, 0].long().tolist()
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            left[name] = module.running_mean.long().tolist()
    return left


def _order(scores: dict[str, Tensor], everywhere: bool) -> list[Removal]:
    """The removals, first to last; every group keeps LEAST of its channels."""
    ranked = {name: score.argsort(stable=True).tolist() for name, score in scores.items()}
    sizes = {name: len(score) for name, score in scores.items()}
    steps = [(name, ranked[name][rank]) for name, rank in in_proportion(sizes, LEAST)]
    if everywhere:
        steps.sort(key=lambda step: float(scores[step[0]][step[1]]))
    return steps


def _scores(dense: nn.Module, image: Tensor, importance: Importance) -> dict[str, Tensor]:
    """The importance of each channel of each group, by the name of the group's first layer."""
    import torch_pruning as tp

    if importance == "depgraph":
        score = tp.importance.GroupMagnitudeImportance(p=2)
    else:
        # Filters of different layers are of different sizes: relative to the mean of their layer.
        score = tp.importance.GroupMagnitudeImportance(
            p=1 if importance == "l1" else 2, group_reduction="first", normalizer="mean"
        )
    network = deep_copy(dense)
    graph = _graph(network, image)
    names = {module: name for name, module in network.named_modules()}
    found = {}
    for group in _groups(graph, network):
        values = score(group)
        name = names[group[0].dep.target.module]
        if values is not None and not _reaches_outputs(dense, image, name):
            found[name] = values.detach().cpu()
    if not found:
        raise UserError("pruning: the network has no channels that could be removed")
    return found


def _reaches_outputs(dense: nn.Module, image: Tensor, name: str) -> bool:
    """Whether the outputs lose a channel with the group of a layer: those of a network of features.

    Those of a classifier are a linear layer's, which stay.
    """
    if any(isinstance(module, nn.Linear) for module in dense.modules()):
        return False
    with torch.no_grad():
        before, after = (
            [x.shape for x in tree_leaves(network(image)) if isinstance(x, Tensor)]
            for network in (dense, _without(dense, image, [(name, 0)]))
        )
    return before != after


def _without(dense: nn.Module, image: Tensor, removed: Sequence[Removal]) -> nn.Module:
    """A copy of `dense` without these channels; they are numbered as in `dense`."""
    import torch_pruning as tp

    network = deep_copy(dense)
    channels: dict[str, list[int]] = {}
    for name, channel in removed:
        channels.setdefault(name, []).append(channel)
    graph = _graph(network, image)
    # A group has its first layer to itself: what one loses does not renumber another's channels.
    for name, idxs in channels.items():
        layer = network.get_submodule(name)
        graph.get_pruning_group(layer, tp.prune_conv_out_channels, idxs=sorted(idxs)).prune()
    return network


def _graph(network: nn.Module, image: Tensor) -> Any:
    import torch_pruning as tp

    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # of parameters that belong to no layer
        return tp.DependencyGraph().build_dependency(network, example_inputs=image)


def _groups(graph: Any, network: nn.Module) -> list[Any]:
    """The groups of coupled convolutions, depthwise ones among them.

    The classifier's outputs stay, and so does what a convolution of several groups of channels
    reads or makes: its groups would not stay equally large.
    """
    kept = [m for m in network.modules() if isinstance(m, nn.Linear)]
    grouped = [
        m
        for m in network.modules()
        if isinstance(m, nn.Conv2d) and m.groups > 1 and m.groups != m.out_channels
    ]
    found = []
    for group in graph.get_all_groups(ignored_layers=kept, root_module_types=[nn.Conv2d]):
        members = [entry.dep.target.module for entry in group]
        if not any(layer in members for layer in grouped):
            found.append(group)
    return found
